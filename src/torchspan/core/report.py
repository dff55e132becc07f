"""Report: what was decided and what was tried, in order, each with its reason."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger("torchspan")

Outcome = Literal["compiled", "loaded", "failed", "timeout", "memory", "crashed", "cancelled", "skipped"]

_PACKAGE_ROOT = str(Path(__file__).resolve().parents[1])
_FOREIGN = (
    "/torch/",
    "/wrapt/",
    "<frozen ",
    "/importlib/",
    "/runpy.py",
    "<string>",
    "<__array_function__",
    "/contextlib.py",
)


@dataclass(frozen=True)
class Decision:
    """A choice with its reason.

    `topic` is the part of torchspan that chose (``backport``, ``device``, ``compile``, ``precompile``, ``pass``, …), `subject`
    what was asked for, `choice` what was given, `site` the user's ``file:line``, `count` how often.
    """

    topic: str
    subject: str
    choice: str
    reason: str
    site: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Attempt:
    """One try at compiling one region. `seconds` of wall clock, `peak_bytes` of the compile's process tree."""

    strategy: str
    region: str
    backend: str
    outcome: Outcome
    seconds: float
    peak_bytes: int | None = None
    cause: str | None = None
    where: str | None = None


class Tally:
    """How often a Decision was made, for a place where calling `Report.decide` each time would cost too much.

    >>> report = Report()
    >>> tally = report.tally("device", "cuda", "cpu", "no CUDA device here")
    >>> tally.count += 3
    >>> report.decisions[0].count
    3
    """

    __slots__ = ("count", "decision")

    def __init__(self, decision: Decision) -> None:
        self.decision = decision
        self.count = 0


class Report:
    """All Decisions and Attempts, in order; thread-safe. Entries are passed on to `parent`, when there is one.

    >>> report = Report()
    >>> report.decide("device", "cuda", "cpu", "no CUDA device here")
    >>> report.decide("device", "cuda", "cpu", "no CUDA device here")
    >>> [(d.subject, d.choice, d.count) for d in report.decisions]
    [('cuda', 'cpu', 2)]
    """

    def __init__(self, parent: Report | None = None) -> None:
        self._parent = parent
        self._lock = threading.Lock()
        self._entries: dict[Any, Decision | Tally | Attempt] = {}
        self._figures: dict[str, float] = {}

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """Every Decision, in the order of its first occurrence."""
        with self._lock:
            entries = tuple(self._entries.values())
        counted = (replace(e.decision, count=e.count) if isinstance(e, Tally) else e for e in entries)
        return tuple(entry for entry in counted if isinstance(entry, Decision) and entry.count)

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """Every Attempt, in order."""
        with self._lock:
            return tuple(entry for entry in self._entries.values() if isinstance(entry, Attempt))

    @property
    def figures(self) -> Mapping[str, float]:
        """Measured figures by name, such as ``first_step_wait_s``."""
        with self._lock:
            return dict(self._figures)

    def decide(self, topic: str, subject: str, choice: str, reason: str, site: str | None = None) -> None:
        """Record a choice; the same choice at the same site is counted, not repeated."""
        key = (topic, subject, choice, reason, site)
        with self._lock:
            known = self._entries.get(key)
            if isinstance(known, Decision):
                self._entries[key] = replace(known, count=known.count + 1)
            else:
                self._entries[key] = Decision(topic, subject, choice, reason, site)
        if known is None:
            log.info("%s: %s → %s (%s)%s", topic, subject, choice, reason, f" at {site}" if site else "")
        if self._parent is not None:
            self._parent.decide(topic, subject, choice, reason, site)

    def tally(self, topic: str, subject: str, choice: str, reason: str, site: str | None = None) -> Tally:
        """A count of the same choice at the same site, for its maker to add to."""
        key = (topic, subject, choice, reason, site, "tally")
        with self._lock:
            known = self._entries.get(key)
            if isinstance(known, Tally):
                return known
        tally = Tally(Decision(topic, subject, choice, reason, site))
        self._share(key, tally)
        log.info("%s: %s → %s (%s)%s", topic, subject, choice, reason, f" at {site}" if site else "")
        return tally

    def _share(self, key: object, tally: Tally) -> None:
        with self._lock:
            self._entries[key] = tally
        if self._parent is not None:
            self._parent._share(key, tally)

    def attempt(self, attempt: Attempt) -> None:
        """Record one try."""
        with self._lock:
            self._entries[object()] = attempt
        log.info("attempt: %s", attempt)
        if self._parent is not None:
            self._parent.attempt(attempt)

    def figure(self, name: str, value: float) -> None:
        """Record a measured figure; the unit is the end of its name."""
        with self._lock:
            self._figures[name] = value
        if self._parent is not None:
            self._parent.figure(name, value)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return {
            "decisions": [asdict(d) for d in self.decisions],
            "attempts": [asdict(a) for a in self.attempts],
            "figures": dict(self.figures),
        }


_current: list[Report] = []


def current_report() -> Report | None:
    """The Report of the environment or command that is in force, if any; new reports make it their parent."""
    return _current[-1] if _current else None


@contextmanager
def reporting(report: Report) -> Iterator[Report]:
    """Make `report` the current one inside the block."""
    _current.append(report)
    try:
        yield report
    finally:
        _current.remove(report)


def user_site(limit: int = 60) -> str | None:
    """``file:line`` of the nearest frame that is neither torchspan's nor torch's nor the import system's."""
    frame = sys._getframe(1)
    for _ in range(limit):
        if frame is None:
            return None
        filename = frame.f_code.co_filename
        if not filename.startswith(_PACKAGE_ROOT) and not any(part in filename for part in _FOREIGN):
            return f"{filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return None
