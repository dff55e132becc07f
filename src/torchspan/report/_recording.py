"""Recording: a run from its begin to its end, with what its children did, made a Page at the end however it ends."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import FrameType, TracebackType

from torchspan.core.errors import InputError
from torchspan.core.report import Decision, Report, reporting
from torchspan.core.text import check_folder
from torchspan.report._page import Page, Run, absolute, make_page, program_files
from torchspan.report._parts import FOLDER_VARIABLE, make_folder, read_parts, write_parts_of_forks

FORMATS = (".html", ".htm", ".json")


class Recording:
    """Collects what a run decides; a context manager around it. `outcome` is set by who runs the program.

    Where a page `is_wanted`, what the children of the run decide is collected too, and being asked to end (SIGTERM) ends the
    program as ``sys.exit`` would, so that there is a page of it.
    """

    def __init__(self, command: Sequence[str], script: str | None, *, is_wanted: bool = True) -> None:
        self.report = Report()
        self.outcome = "ended"
        self._signal = ""
        self._process = os.getpid()
        self._command = tuple(command)
        self._script = script
        self._is_wanted = is_wanted
        self._folder = os.getcwd()
        self._started = time.time()
        self._parts = ""
        self._reporting = reporting(self.report)

    def __enter__(self) -> Recording:
        if self._is_wanted:
            self._parts = os.environ[FOLDER_VARIABLE] = make_folder()
            write_parts_of_forks(self.report)
            if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                signal.signal(signal.SIGTERM, self._end)
        self._reporting.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._reporting.__exit__(kind, error, trace)
        if self._is_wanted and self.is_here:
            os.environ.pop(FOLDER_VARIABLE, None)
            shutil.rmtree(self._parts, ignore_errors=True)

    @property
    def is_here(self) -> bool:
        """Whether this is the process that the recording was begun in, and not one that the program forked off it."""
        return os.getpid() == self._process

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        sys.exit(128 + number)

    def page(self) -> Page:
        """The Page of the run so far."""
        parts = read_parts(self._parts)
        together = Report()
        for decision in [*self.report.decisions, *(decision for part in parts for decision in part.decisions)]:
            together.add(self._placed(decision))
        for attempt in [*self.report.attempts, *(attempt for part in parts for attempt in part.attempts)]:
            together.add(attempt)
        for name, value in self.report.figures.items():
            together.figure(name, value)
        files = [*program_files(self._script, self._folder), *(file for part in parts for file in part.files)]
        return make_page(together, self._run(1 + len(parts)), files)

    def _placed(self, decision: Decision) -> Decision:
        """The Decision with the whole path of its file: of the same file, a child may know that, and its parent less."""
        path, colon, line = (decision.site or "").rpartition(":")
        return replace(decision, site=f"{absolute(path, self._folder)}:{line}") if colon else decision

    def _run(self, num_processes: int) -> Run:
        rank, world_size = rank_of_world()
        python = ".".join(map(str, sys.version_info[:3]))
        versions = {"torchspan": version("torchspan"), "torch": version("torch"), "Python": python}
        seconds = time.time() - self._started
        outcome = f"ended by {self._signal}" if self._signal else self.outcome
        return Run(self._command, self._folder, outcome, self._started, seconds, rank, world_size, num_processes, versions)


def rank_of_world() -> tuple[int | None, int | None]:
    """The rank of this process and how many there are, as torchrun says; None where it is one alone."""
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    return (int(rank), int(size)) if rank.isdigit() and size.isdigit() and int(size) > 1 else (None, None)


def report_path(path: Path) -> Path:
    """Where this process writes its page: `path`; under torchrun, the name of every rank but the first says which it is.

    Raises:
        InputError: neither HTML nor JSON, or no place to write to.
    """
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"report {str(path)!r} is of no known kind; expected a name that ends in .html or .json")
    check_folder(path)
    rank, _ = rank_of_world()
    return (path.with_name(f"{path.stem}.rank{rank}{path.suffix}") if rank else path).absolute()
