"""Parts: what a program's child processes decided, written by each to a file of its own and put on the parent's page.

A child writes each new entry when it is made, so that one that is killed is on the page too, and its counts when it ends.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing.util
import os
import tempfile
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torchspan.core.report import Attempt, Decision, Report

FOLDER_VARIABLE = "TORCHSPAN_REPORT_PARTS"
"""The environment variable that tells a child where to write; its parent removes the folder."""


@dataclass(frozen=True)
class Part:
    """What one child decided and tried. `is_complete` is False where it was ended before it could count."""

    pid: int
    decisions: Sequence[Decision]
    attempts: Sequence[Attempt]
    files: Sequence[str]
    is_complete: bool


class _Writer:
    """Writes the part of this process. `before` is what was decided before it was forked off."""

    def __init__(self, report: Report, folder: str, before: Iterable[Decision] = ()) -> None:
        self._report = report
        self._pid = os.getpid()
        self._folder = os.getcwd()
        self._path = Path(folder) / f"{self._pid}-{uuid.uuid4().hex}.jsonl"
        self._before = {replace(decision, count=1): decision.count for decision in before}
        self._is_done = False
        report.watch(self._write_entry)

    def _write_entry(self, entry: Decision | Attempt) -> None:
        if os.getpid() == self._pid and not self._is_done:
            self._write({type(entry).__name__: asdict(entry)})

    def finish(self) -> None:
        """Write what was counted; once, and only in the process that this is of."""
        if os.getpid() != self._pid or self._is_done:
            return
        self._is_done = True
        decisions = [asdict(decision) for decision in _since(self._before, self._report.decisions)]
        attempts = [asdict(attempt) for attempt in self._report.attempts] if not self._before else []
        if decisions or attempts:
            from torchspan.report._page import program_files

            self._write({"decisions": decisions, "attempts": attempts, "files": program_files(None, self._folder)})

    def _write(self, values: dict[str, Any]) -> None:
        try:
            with self._path.open("a", encoding="utf-8", errors="surrogateescape") as file:
                file.write(json.dumps(values) + "\n")
        except FileNotFoundError:
            self._is_done = True  # the parent has ended, and its page is made


def _since(before: dict[Decision, int], decisions: Iterable[Decision]) -> list[Decision]:
    counted = ((d, d.count - before.get(replace(d, count=1), 0)) for d in decisions)
    return [replace(decision, count=count) for decision, count in counted if count > 0]


def make_folder() -> str:
    """A new folder for the parts of this process's children; its name says whose it is."""
    return tempfile.mkdtemp(prefix=f"torchspan-report-{os.getpid()}-")


def write_part(report: Report) -> None:
    """Write what `report` holds for the page of the process that started this one, if that asked for it."""
    folder = os.environ.get(FOLDER_VARIABLE, "")
    if folder and Path(folder).name.split("-")[2] != str(os.getpid()):
        atexit.register(_Writer(report, folder).finish)
        write_parts_of_forks(report)


def write_parts_of_forks(report: Report) -> None:
    """Let each process that `multiprocessing` forks off this one write its part."""
    multiprocessing.util.register_after_fork(report, _write_part_of_fork)


def _write_part_of_fork(report: Report) -> None:
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder and os.getpid() != _started_in:
        writer = _Writer(report, folder, report.decisions)
        multiprocessing.util.Finalize(None, writer.finish, exitpriority=100)


_started_in = os.getpid()


def read_parts(folder: str) -> list[Part]:
    """Every Part that was written to `folder`."""
    return [_read(path) for path in sorted(Path(folder).glob("*.jsonl"))]


def _read(path: Path) -> Part:
    decisions, attempts = [], []
    for line in path.read_text("utf-8", "surrogateescape").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a process that was killed while it wrote
        if "decisions" in values:
            decisions = [Decision.from_dict(decision) for decision in values["decisions"]]
            attempts = [Attempt(**attempt) for attempt in values["attempts"]]
            return Part(_pid(path), decisions, attempts, values["files"], True)
        decisions += [Decision.from_dict(values["Decision"])] if "Decision" in values else []
        attempts += [Attempt(**values["Attempt"])] if "Attempt" in values else []
    return Part(_pid(path), decisions, attempts, (), False)


def _pid(path: Path) -> int:
    return int(path.name.partition("-")[0])
