"""Shows a compile that somebody waits for: its phase, seconds and memory, on standard error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from torchspan.core.text import format_bytes
from torchspan.jobs.budget import Budget
from torchspan.regions.phases import PhaseName, phase_of

Tick = Callable[[Path], None]  # called with the job's folder now and then


def is_wanted(progress: bool | None) -> bool:
    """Whether to show it: as `progress` says; with None, where standard error is a terminal."""
    return sys.stderr.isatty() if progress is None else progress


@contextmanager
def shown(name: str, budget: Budget) -> Iterator[Tick]:
    """Show how far the compile of `name` has come: a line that moves on a terminal, else a line a phase."""
    console = Console(stderr=True)
    follower, began = _Follower(), time.monotonic()
    if not console.is_terminal:
        yield _Lines(name, follower, began)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[figures]}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"compiling {name}: start", total=budget.seconds, figures="")

        def tick(folder: Path) -> None:
            seconds = time.monotonic() - began
            phase = follower.phase(folder)
            figures = f"{seconds:.0f} of {budget.seconds:.0f} s, {_of_limit(follower.used(folder), budget)}"
            bar.update(task, completed=seconds, description=f"compiling {name}: {phase}", figures=figures)

        yield tick


def _of_limit(used: int, budget: Budget) -> str:
    limit = "" if budget.limit_bytes is None else f" of {format_bytes(budget.limit_bytes)}"
    return format_bytes(used) + limit


class _Lines:
    """Prints a line whenever the phase is another one: for a log file."""

    def __init__(self, name: str, follower: _Follower, began: float) -> None:
        self._name = name
        self._follower = follower
        self._began = began
        self._last: PhaseName | None = None

    def __call__(self, folder: Path) -> None:
        phase = self._follower.phase(folder)
        if phase != self._last:
            self._last = phase
            seconds, used = time.monotonic() - self._began, format_bytes(self._follower.used(folder))
            sys.stderr.write(f"torchspan: compiling {self._name}: {phase}, after {seconds:.1f} s, {used}\n")


class _Follower:
    """Reads what a compile process notes, as it comes."""

    def __init__(self) -> None:
        self._offset = 0
        self._open: list[tuple[str, PhaseName]] = []
        self._phase: PhaseName = "start"
        self._used = 0

    def phase(self, folder: Path) -> PhaseName:
        """What it does now."""
        events = folder / "events"
        if events.exists():
            with events.open("rb") as file:
                file.seek(self._offset)
                *whole, incomplete = file.read().split(b"\n")
                self._offset = file.tell() - len(incomplete)
            for line in whole:
                self._follow(json.loads(line))
        return self._phase

    def _follow(self, line: dict[str, str]) -> None:
        name = line["name"]
        if line["kind"] == "B":
            around = self._open[-1][1] if self._open else "run"
            self._open.append((name, phase_of(name) or around))
            self._phase = self._open[-1][1]
        elif line["kind"] == "E":
            last = next((i for i in reversed(range(len(self._open))) if self._open[i][0] == name), None)
            if last is not None:
                del self._open[last:]
            self._phase = self._open[-1][1] if self._open else self._phase

    def used(self, folder: Path) -> int:
        """The bytes of the compile process and all below it, as last seen."""
        used = folder / "used"
        text = used.read_text() if used.exists() else ""  # it may be just being written
        self._used = int(text or 0) or self._used  # none any more: it has ended
        return self._used
