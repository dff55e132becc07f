"""What a profile of a compile holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torchspan.core.report import Outcome
from torchspan.regions.phases import PhaseName


@dataclass(frozen=True)
class Event:
    """A timed event of the compile: `began_s` after its start, and how deep in others; `is_open` if it never ended."""

    name: str
    phase: PhaseName
    began_s: float
    seconds: float
    self_seconds: float
    depth: int
    thread: int
    compile_id: str | None = None
    is_open: bool = False


@dataclass(frozen=True)
class Phase:
    """What one phase took, without what the phases inside it did: wall-clock `seconds`, most memory of the process tree."""

    name: PhaseName
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class GraphCost:
    """A graph that dynamo found: where its code begins, how large it is, and the seconds that each phase gave it."""

    compile_id: str
    function: str | None
    site: str | None
    num_operations: int
    num_nodes: int
    num_guards: int
    seconds: Mapping[str, float]

    @property
    def total_seconds(self) -> float:
        """The seconds of all phases."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class GraphBreak:
    """Where dynamo ended a graph early, and why."""

    site: str | None
    reason: str
    compile_id: str


@dataclass(frozen=True)
class Profile:
    """Where a compile's time and memory went.

    Attributes:
        region: what was compiled.
        outcome: ``compiled``, or how it ended: ``timeout``, ``memory``, ``failed``, ``crashed``.
        seconds: wall clock, the start of the compile process included.
        peak_bytes: the most resident memory of the compile process and all that it started.
        phases: seconds and memory by phase, each without the phases inside it; they sum up to `seconds`.
        graphs: the graphs, each with its size and its share of every phase.
        breaks: where dynamo ended a graph early.
        events: torch's own timed events, in order.
        memory: (seconds, bytes) each time that the memory changed.
        cause: why it ended, unless it compiled; `where` the innermost frames.
        stack: of a compile that was ended or crashed, every thread's frames just before.
        open_events: of such a compile, what it was in the middle of, outermost first.
        commands: of such a compile, what its child processes were running: a C++ compiler, say.
        settings: how torch.compile was called; `versions` of Python and torch.
    """

    region: str
    outcome: Outcome
    seconds: float
    peak_bytes: int | None
    phases: tuple[Phase, ...]
    graphs: tuple[GraphCost, ...] = ()
    breaks: tuple[GraphBreak, ...] = ()
    events: tuple[Event, ...] = ()
    memory: tuple[tuple[float, int], ...] = ()
    cause: str | None = None
    where: str | None = None
    stack: str | None = None
    open_events: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def seconds_in(self, phase: PhaseName) -> float:
        """The seconds of one phase; 0 where the compile did not come to it."""
        return sum(entry.seconds for entry in self.phases if entry.name == phase)

    def to_dict(self) -> dict[str, Any]:
        """The profile as plain values, for JSON."""
        return asdict(self)
