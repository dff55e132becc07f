"""The page: what a run's Report says, put in the order in which a person ports the program. Values only; drawn elsewhere."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torchspan.core.report import Attempt, Decision, Report
from torchspan.core.topics import Standing, Topic
from torchspan.report._portable import Porter, Work
from torchspan.report._source import Source, without_comments

SCHEMA = "torchspan.report/1"

_MOST_FILES = 5000
_NAMED = ("cuda", "nccl")
_INSTALLED = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class Run:
    """What was run, and how it ended. Times are in seconds since 1970, and in seconds."""

    command: Sequence[str] = ()
    folder: str = ""
    outcome: str = "ended"
    started: float = 0.0
    seconds: float = 0.0
    rank: int | None = None
    world_size: int | None = None
    num_processes: int = 1
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """What one line asked for, what it was given and why, and how often; `function` is where the line is."""

    line: int
    asked: str
    given: str
    reason: str
    standing: Standing
    count: int
    function: str | None = None


@dataclass(frozen=True)
class Statement:
    """One statement of the program, from line `first` to `last`, and what to write instead.

    `work` is ``replace`` where `portable` takes its place, ``nothing`` where it runs everywhere as it is, ``by hand`` where no
    line does, or only a part of one: `notes` say what. `is_partial`: the portable one still names CUDA. A statement
    without `entries` names a device, and asked for nothing itself in this run.
    """

    first: int
    last: int
    source: str
    portable: str | None
    notes: Sequence[str] = ()
    entries: Sequence[Entry] = ()
    is_partial: bool = False
    work: Work = "nothing"

    @property
    def count(self) -> int:
        """How many requests were redirected here."""
        return sum(entry.count for entry in self.entries)

    @property
    def is_reached(self) -> bool:
        """Whether anything was asked for here."""
        return bool(self.entries)


@dataclass(frozen=True)
class File:
    """One file of the program, or of an installed package. `header` is what its portable lines need at its top.

    `is_changed`: whether it was written to after the run began, so that its lines may not be those that ran.
    """

    path: str
    name: str
    statements: Sequence[Statement]
    header: str | None = None
    is_installed: bool = False
    is_changed: bool = False


@dataclass(frozen=True)
class Page:
    """All that the page, the JSON and the table show."""

    run: Run
    files: Sequence[File]
    unplaced: Sequence[Entry]
    backports: Sequence[Decision]
    unsupported: Sequence[Decision]
    choices: Sequence[Decision]
    attempts: Sequence[Attempt]
    figures: Mapping[str, float]
    decisions: Sequence[Decision]

    @cached_property
    def summary(self) -> dict[str, int]:
        """The numbers at the top: of the program's own files where they name things to be ported."""
        own = [file for file in self.files if not file.is_installed]
        reached = [s for file in own for s in file.statements if s.is_reached]
        entries = [e for file in self.files for s in file.statements for e in s.entries] + list(self.unplaced)
        return {
            "files": len(own),
            "lines": len(reached),
            "calls": sum(entry.count for entry in entries),
            "simulated": sum(entry.standing is Standing.SIMULATED for entry in entries),
            "unsupported": len(self.unsupported) + sum(entry.standing is Standing.UNSUPPORTED for entry in entries),
            "without_portable_line": sum(s.portable is None and s.work == "by hand" for s in reached),
            "nothing_to_do": sum(s.work == "nothing" for s in reached),
            "named_only": sum(not s.is_reached for file in own for s in file.statements),
            "installed_files": len(self.files) - len(own),
            "backports": len(self.backports),
            "compile_attempts": len(self.attempts),
        }

    @cached_property
    def usual(self) -> tuple[str, str] | None:
        """What most requests were given and why; the page says it once."""
        pairs = Counter((e.given, e.reason) for file in self.files for s in file.statements for e in s.entries)
        return max(pairs, key=lambda pair: pairs[pair]) if pairs else None

    def to_dict(self) -> dict[str, Any]:
        """The page as plain values, for JSON; docs/porting.md describes them."""
        values = asdict(self)
        return {"schema": SCHEMA, "run": values.pop("run"), "summary": self.summary, **values}


def make_page(report: Report, run: Run, program_files: Iterable[str] = ()) -> Page:
    """The Page of what `report` holds.

    Args:
        report: the Decisions and Attempts of the run.
        run: what was run.
        program_files: the files that are the program's own; those that name CUDA are on the page although no line of theirs
            asked for anything.
    """
    decisions = report.decisions
    sites: dict[str, list[tuple[int, Decision]]] = defaultdict(list)
    unplaced = []
    for decision in decisions:
        path, _, line = (decision.site or "").rpartition(":")
        if decision.topic is not Topic.DEVICE:
            continue
        if path and line.isdigit():
            sites[absolute(path, run.folder)].append((int(line), decision))
        else:
            unplaced.append(_entry(0, decision))
    for path in program_files:
        sites.setdefault(absolute(path, run.folder), [])
    files = (_file(path, placed, run) for path, placed in list(sites.items())[:_MOST_FILES])
    other = [d for d in decisions if d.topic not in (Topic.DEVICE, Topic.BACKPORT, Topic.UNSUPPORTED)]
    return Page(
        run=run,
        files=sorted(filter(None, files), key=lambda file: (file.is_installed, file.name.startswith("<"), file.name)),
        unplaced=unplaced,
        backports=[d for d in decisions if d.topic is Topic.BACKPORT],
        unsupported=[d for d in decisions if d.topic is Topic.UNSUPPORTED],
        choices=other,
        attempts=report.attempts,
        figures=dict(report.figures),
        decisions=decisions,
    )


def program_files(script: str | None, folder: str) -> list[str]:
    """The files of the program that this process imported: those under the folder of its script, or `folder`, not installed."""
    root = Path(absolute(script, folder)).parent if script else Path(folder)
    paths = {absolute(script, folder)} if script else set()
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None)
        if isinstance(path, str) and path.endswith(".py") and not is_installed(path) and _is_under(path, root):
            paths.add(absolute(path, folder))
    return sorted(paths)


def absolute(path: str, folder: str) -> str:
    """`path` as seen from `folder`; what is no path (``<stdin>``) as it is."""
    return path if path.startswith("<") else os.path.normpath(os.path.join(folder, path))


def is_installed(path: str) -> bool:
    """Whether a file belongs to Python or to an installed package, not to the program."""
    return any(part in _INSTALLED for part in Path(path).parts) or _is_under(path, Path(os.__file__).parent)


def _is_under(path: str, root: Path) -> bool:
    return Path(path).is_absolute() and Path(path).is_relative_to(root)


def _file(path: str, placed: Sequence[tuple[int, Decision]], run: Run) -> File | None:
    """What is to be said of one file, or None where that is nothing."""
    installed = is_installed(path)
    source = Source(path)
    if not placed and not any(word in source.text for word in _NAMED):
        return None
    porter = None if installed else Porter(source)
    by_span: dict[tuple[int, int], list[Entry]] = {span: [] for span in (porter.named() if porter else ())}
    for line, decision in placed:
        by_span.setdefault(source.span(line), []).append(_entry(line, decision))
    if not by_span:
        return None
    statements = [_statement(source, porter, span, entries) for span, entries in sorted(by_span.items())]
    header = porter.header() if porter else None
    return File(path, _name(path, run.folder, installed), statements, header, installed, _is_changed(path, run.started))


def _statement(source: Source, porter: Porter | None, span: tuple[int, int], entries: Sequence[Entry]) -> Statement:
    entries = sorted(entries, key=lambda entry: entry.line)
    text = source.shown(span)
    if porter is None:
        return Statement(*span, text, None, (), entries)
    port = porter.port(span, [entry.asked for entry in entries])
    is_partial = re.search(r"torch\.cuda\b|[\"']cuda", without_comments(port.portable or "")) is not None
    is_refused = any(entry.standing is Standing.UNSUPPORTED for entry in entries)
    work: Work = "by hand" if is_refused and port.work == "nothing" else port.work
    return Statement(*span, text, port.portable, port.notes, entries, is_partial, work)


def _entry(line: int, decision: Decision) -> Entry:
    return Entry(line, decision.subject, decision.choice, decision.reason, decision.standing, decision.count, decision.function)


def shown_site(site: str | None, folder: str) -> str:
    """A ``file:line`` as a person calls it."""
    path, colon, line = (site or "").rpartition(":")
    return f"{_name(path, folder, is_installed(path))}:{line}" if colon else site or ""


def _name(path: str, folder: str, installed: bool) -> str:
    """A path as a person calls it: from the folder of the run, or from where packages are installed."""
    if installed:
        parts = Path(path).parts
        for name in _INSTALLED:
            if name in parts:
                return str(Path(*parts[parts.index(name) + 1 :]))
    return os.path.relpath(path, folder) if folder and _is_under(path, Path(folder)) else path


def _is_changed(path: str, started: float) -> bool:
    try:
        return bool(started) and os.stat(path).st_mtime > started
    except (OSError, ValueError):
        return False  # no file: a notebook's cell
