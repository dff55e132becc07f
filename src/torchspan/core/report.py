"""Report: what was decided and what was tried, in order, each with its reason."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from torchspan.core.logs import is_logged_each, log_at
from torchspan.core.text import format_figure
from torchspan.core.topics import Standing, Topic

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

    `topic` is the part of torchspan that chose, `subject` what was asked for, `choice` what was given, `site` the user's
    ``file:line``, `function` where that is, `count` how often, `standing` how the choice stands to what was asked for.
    """

    topic: Topic
    subject: str
    choice: str
    reason: str
    site: str | None = None
    count: int = 1
    function: str | None = None
    standing: Standing = Standing.REDIRECTED

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Decision:
        """The Decision of what :meth:`Report.to_dict` gave for it."""
        return cls(**{**values, "topic": Topic.of(values["topic"]), "standing": Standing.of(values["standing"])})


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


class _LoggedTally(Tally):
    """A Tally that logs each time that its count grows, for whoever asked to see every occurrence."""

    __slots__ = ("_count",)

    @property
    def count(self) -> int:
        return self._count

    @count.setter
    def count(self, value: int) -> None:
        self._count = value
        if value:
            _log(self.decision, "DEBUG")


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
        self._on_new: Callable[[Decision | Attempt], None] = lambda entry: None
        self._lock = threading.Lock()
        self._entries: dict[Any, Decision | Tally | Attempt] = {}
        self._figures: dict[str, float] = {}

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """Every Decision, in the order of its first occurrence."""
        with self._lock:
            entries = tuple(self._entries.values())
        counts: dict[Decision, int] = {}
        for entry in entries:
            if not isinstance(entry, Attempt):
                decision = entry.decision if isinstance(entry, Tally) else replace(entry, count=1)
                counts[decision] = counts.get(decision, 0) + entry.count
        return tuple(replace(decision, count=count) for decision, count in counts.items() if count)

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

    def decide(
        self,
        topic: str,
        subject: str,
        choice: str,
        reason: str,
        site: str | None = None,
        standing: Standing = Standing.REDIRECTED,
    ) -> None:
        """Record a choice; the same choice at the same site is counted, not repeated.

        Raises InputError for a `topic` that is none of :class:`Topic`.
        """
        topic = Topic.of(topic)
        key = (topic, subject, choice, reason, site)
        with self._lock:
            known = self._entries.get(key)
            if isinstance(known, Decision):
                entry = replace(known, count=known.count + 1)
            else:
                entry = Decision(topic, subject, choice, reason, site, function=_function_at(site), standing=standing)
            self._entries[key] = entry
        if self._parent is not None:
            self._parent.decide(topic, subject, choice, reason, site, standing)
        else:
            _log(entry, "INFO" if entry.count == 1 else "DEBUG")
        if entry.count == 1:
            self._on_new(entry)

    def tally(
        self,
        topic: str,
        subject: str,
        choice: str,
        reason: str,
        site: str | None = None,
        standing: Standing = Standing.REDIRECTED,
    ) -> Tally:
        """A count of the same choice at the same site, for its maker to add to."""
        topic = Topic.of(topic)
        key = (topic, subject, choice, reason, site, "tally")
        with self._lock:
            known = self._entries.get(key)
            if isinstance(known, Tally):
                return known
        decision = Decision(topic, subject, choice, reason, site, function=_function_at(site), standing=standing)
        tally = _LoggedTally(decision) if is_logged_each(topic) else Tally(decision)
        _log(decision, "INFO")
        with self._lock:
            self._entries[key] = tally
        self._share(tally)
        return tally

    def _share(self, tally: Tally) -> None:
        """Show `tally` to those who watch, and pass it to the parent, which may have others of the same choice and site."""
        self._on_new(tally.decision)
        if self._parent is not None:
            with self._parent._lock:
                self._parent._entries[id(tally)] = tally
            self._parent._share(tally)

    def attempt(self, attempt: Attempt) -> None:
        """Record one try."""
        with self._lock:
            self._entries[object()] = attempt
        self._on_new(attempt)
        if self._parent is not None:
            self._parent.attempt(attempt)
        else:
            log_at("INFO", "compile", None, None, "attempt: %s", attempt)

    def figure(self, name: str, value: float) -> None:
        """Record a measured figure; the unit is the end of its name."""
        with self._lock:
            self._figures[name] = value
        if self._parent is not None:
            self._parent.figure(name, value)

    def add(self, entry: Decision | Attempt) -> None:
        """Add an entry of another process; its count is added to that of an equal one here."""
        with self._lock:
            key: object = replace(entry, count=0) if isinstance(entry, Decision) else object()
            known = self._entries.get(key)
            if isinstance(entry, Decision) and isinstance(known, Decision):
                entry = replace(entry, count=known.count + entry.count)
            self._entries[key] = entry

    def watch(self, on_new: Callable[[Decision | Attempt], None]) -> None:
        """Call `on_new` with each entry when it is first made, from now on."""
        self._on_new = on_new

    def __str__(self) -> str:
        """The report as text: what was decided, by topic, and what was tried.

        >>> report = Report()
        >>> report.decide("device", "cuda", "cpu", "no CUDA device here")
        >>> print(report)
        redirected
          cuda → cpu (no CUDA device here)
        """
        lines = []
        for topic in Topic:
            of_topic = [decision for decision in self.decisions if decision.topic is topic]
            lines += [topic.heading] if of_topic else []
            for decision in of_topic:
                times = f" {decision.count}×" if decision.count > 1 else ""
                lines.append(f"  {decision.subject} → {decision.choice}{times} ({decision.reason})")
        for attempt in self.attempts:
            why = f": {attempt.cause}" if attempt.cause else ""
            lines.append(f"{attempt.outcome} {attempt.region} by {attempt.strategy} in {attempt.seconds:.1f} s{why}")
        lines += [": ".join(format_figure(name, value)) for name, value in self.figures.items()]
        return "\n".join(lines) or "nothing was changed"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return f"<pre>{escape(str(self))}</pre>"

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


def _log(decision: Decision, level: Literal["INFO", "DEBUG"]) -> None:
    arguments = (decision.subject, decision.choice, decision.reason)
    log_at(level, decision.topic, decision.site, decision.function, "%s → %s (%s)", *arguments)


def _function_at(site: str | None, limit: int = 60) -> str | None:
    """The name of the function on the stack that is at the line `site`."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(limit):
        if frame is None or site is None:
            return None
        code = frame.f_code
        if f"{code.co_filename}:{frame.f_lineno}" == site:
            return getattr(code, "co_qualname", code.co_name)
        frame = frame.f_back
    return None


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
