"""How dynamo compiles a program: its graphs, where it ends them early and why, its guards, what it compiled again."""

from __future__ import annotations

import faulthandler
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any

import torch

from torchspan.diagnosis.profile import GraphBreak
from torchspan.jobs.budget import DEFAULT_BUDGET, Budget
from torchspan.private import dynamo, fx
from torchspan.regions.compiler_events import watching_compiler
from torchspan.regions.events import graph_facts

GRACE_S = 3.0  # for Python code to notice that its time is over, before the whole process is ended


@dataclass(frozen=True)
class Hung:
    """A compile that was not done after `seconds`: the program's line that dynamo was at, and where dynamo itself was."""

    seconds: float
    site: str | None
    where: str


class CompileHungError(BaseException):
    """Ends a program whose compile hangs; no Exception, so that neither dynamo nor the program takes it for one of its own."""


@dataclass(frozen=True)
class GraphFound:
    """A graph: the function and line that it begins in, how large it is, how many guards were there when it was done."""

    compile_id: str
    function: str | None
    site: str | None
    num_operations: int
    num_guards: int


@dataclass(frozen=True)
class Recompile:
    """A function that dynamo compiled again, and which guard had failed."""

    compile_id: str
    function: str
    site: str
    reason: str


@dataclass
class Explanation:
    """What dynamo made of a program so far."""

    graphs: list[GraphFound] = field(default_factory=list)
    breaks: list[GraphBreak] = field(default_factory=list)
    recompiles: list[Recompile] = field(default_factory=list)
    num_calls: int = 0
    hung: list[Hung] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The explanation as plain values, for JSON."""
        return asdict(self)


@contextmanager
def explaining(budget: Budget = DEFAULT_BUDGET) -> Iterator[Explanation]:
    """Inside the block, ``torch.compile`` traces only, whatever backend is asked for: graphs run eagerly and are noted.

    Dynamo traces in this process, with the `fullgraph` and `dynamic` that the program asks for. A trace that takes longer than
    the seconds of `budget` ends the program: with CompileHungError where Python code can be interrupted (in the main thread),
    else the process, after all its stacks were printed.
    """
    explanation = Explanation()

    def on_graph(graph: torch.fx.GraphModule, compile_id: str, num_guards: int) -> None:
        facts = graph_facts(graph)
        explanation.graphs.append(GraphFound(compile_id, facts["function"], facts["site"], facts["operations"], num_guards))

    def on_break(reason: str, stack: list[traceback.FrameSummary], compile_id: str) -> None:
        site = f"{stack[-1].filename}:{stack[-1].lineno}" if stack else None
        if not any((graph_break.site, graph_break.reason) == (site, reason) for graph_break in explanation.breaks):
            explanation.breaks.append(GraphBreak(site, reason, compile_id))

    original = torch.compile

    def compile(model: Callable[..., Any] | None = None, **arguments: Any) -> Any:
        if model is None:
            return lambda program: compile(program, **arguments)
        explanation.num_calls += 1
        kept = {name: arguments[name] for name in ("fullgraph", "dynamic", "disable") if name in arguments}
        return original(model, backend="eager", **kept)

    watching = watching_compiler(lambda *event: None, on_graph, on_break)
    with watching, dynamo.noting_recompiles() as again, _limited(budget.seconds, explanation):
        torch.compile = compile
        try:
            yield explanation
        finally:
            torch.compile = original
            explanation.recompiles += [Recompile(*row) for row in again()]


@contextmanager
def _limited(limit_s: float, explanation: Explanation) -> Iterator[None]:
    """End whatever compile inside the block takes longer than that."""

    def on_alarm(number: int, frame: FrameType | None) -> None:
        frames = reversed(traceback.extract_stack(frame)[-8:])
        where = "; ".join(f"{entry.filename}:{entry.lineno} in {entry.name}" for entry in frames)
        explanation.hung.append(Hung(limit_s, fx.traced_line(), where))
        raise CompileHungError(f"a compile was not done after {limit_s:g} s; it hung at {explanation.hung[-1].site or where}")

    def on_start() -> None:
        faulthandler.dump_traceback_later(limit_s + GRACE_S, exit=True, file=2)  # if C code holds the GIL, too
        if threading.current_thread() is threading.main_thread():
            signal.setitimer(signal.ITIMER_REAL, limit_s)

    def on_end() -> None:
        faulthandler.cancel_dump_traceback_later()
        if threading.current_thread() is threading.main_thread():
            signal.setitimer(signal.ITIMER_REAL, 0)

    before = signal.signal(signal.SIGALRM, on_alarm) if threading.current_thread() is threading.main_thread() else None
    try:
        with dynamo.around_compiles(on_start, on_end):
            yield
    finally:
        on_end()
        if before is not None:
            signal.signal(signal.SIGALRM, before)
