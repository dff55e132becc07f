"""The scan: every use of torch in a code base, judged by the database and by what the backports provide."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import os
import re
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torchspan.core.errors import InputError
from torchspan.scan._judge import Judge, Judged, releases_asked, says, since
from torchspan.scan._names import Names
from torchspan.scan._paths import ROOTS
from torchspan.scan._uses import FileUses, Use, read_uses

_SKIPPED = frozenset({"__pycache__", "node_modules"})

Standing = Literal["covered", "uncovered", "guarded", "unknown"]


@dataclass(frozen=True)
class Finding:
    """A name (or argument) of torch that some release lacks, where a file uses it.

    `has` are the releases that have it. Its `standing`: ``covered`` by `backport` wherever a release asked for lacks it;
    ``uncovered``; ``guarded``: the program itself asks first (`guard` says how); ``unknown``: no release has it.
    """

    path: str
    line: int
    name: str
    has: tuple[str, ...]
    standing: Standing
    says: str
    backport: str = ""
    guard: str = ""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.name} {self.says}"


@dataclass(frozen=True)
class Scan:
    """What a scan found. `needs` are the releases that every unguarded use is in, `runs` those with torchspan's backports.

    `known` are all releases that the database knows.
    """

    findings: tuple[Finding, ...]
    asked: tuple[str, ...]
    needs: tuple[str, ...]
    runs: tuple[str, ...]
    num_files: int
    num_lines: int
    unreadable: Mapping[str, str] = field(default_factory=dict)
    summary: str = ""
    known: tuple[str, ...] = ()

    @cached_property
    def uncovered(self) -> tuple[Finding, ...]:
        """What stands in the way."""
        return self.of("uncovered")

    def of(self, standing: Standing) -> tuple[Finding, ...]:
        """The findings of one standing."""
        return tuple(finding for finding in self.findings if finding.standing == standing)

    def texts(self, standing: str) -> list[str]:
        """A line for each name in each file, for the findings of one standing."""
        same: dict[tuple[str, str], list[Finding]] = {}
        for finding in self.findings:
            if finding.standing == standing:
                same.setdefault((finding.path, finding.name), []).append(finding)
        return [str(first) + _also(others) for first, *others in same.values()]

    @property
    def exit_code(self) -> int:
        """1 where something stays uncovered."""
        return 1 if self.uncovered else 0

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "asked": list(self.asked),
            "needs": list(self.needs),
            "runs_with_torchspan": list(self.runs),
            "summary": self.summary,
            "files": self.num_files,
            "lines": self.num_lines,
            "unreadable": dict(self.unreadable),
            "findings": [{**vars(finding), "has": list(finding.has)} for finding in self.findings],
        }


def _also(others: Sequence[Finding]) -> str:
    lines = [str(other.line) for other in others]
    return f"; also on line{'s' if len(lines) > 1 else ''} {', '.join(lines)}" if lines else ""


def scan(paths: Sequence[str | os.PathLike[str]], torch: str | None = None) -> Scan:
    """Find which torch the Python files at `paths` need, and what of it torchspan's backports cover.

    Args:
        paths: files, folders that are searched for ``*.py``, and names of installed packages.
        torch: a release such as ``2.8``: only what that one lacks is found. By default each release that torchspan runs on.

    Raises:
        InputError: a path that is not there, no Python file in any, a torch that the database does not know, or no file that
            can be read.
    """
    names = Names.load()
    releases = releases_asked(names, torch)
    files = list(_files(paths))
    read, unreadable, num_lines = _read(files, names.members_of_tensors_alone)
    if unreadable and len(unreadable) == len(files):
        first, reason = next(iter(unreadable.items()))
        raise InputError(f"none of {len(files)} files can be read; {first}: {reason}")
    judge = Judge(names, {name for uses in read.values() for name in uses.sets})
    tally = _Findings(judge, releases)
    findings = [finding for path, uses in read.items() for finding in tally.of(path, uses)]
    running = tally.running & judge.supported
    return Scan(
        findings=tuple(findings),
        asked=judge.releases(releases),
        needs=judge.releases(tally.needed),
        runs=judge.releases(running),
        num_files=len(files),
        num_lines=num_lines,
        unreadable=unreadable,
        known=names.minors,
        summary=_summary(judge, tally.needed, releases, running, len(files), num_lines),
    )


# files


def _files(paths: Sequence[str | os.PathLike[str]]) -> Iterator[Path]:
    seen: set[Path] = set()
    for path in map(Path, paths):
        if not path.exists():
            files = sorted(_installed(str(path)))
            if not files:
                raise _missing(path)
        else:
            files = sorted(_python_files(path)) if path.is_dir() else [path]
        if not files:
            raise InputError(f"no Python file in {str(path)!r}; expected a folder with *.py files, or a file")
        for file in files:
            if file not in seen:
                seen.add(file)
                yield file


def _installed(name: str) -> Iterator[Path]:
    """The Python files of an installed package, given by the name it is installed or imported by; nothing is imported."""
    if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", name):
        return
    with suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.distribution(name).files or ():
            if file.name.endswith(".py") and ".." not in file.parts and len(file.parts) > 1:
                yield Path(str(file.locate()))
    spec = None if "." in name else importlib.util.find_spec(name.replace("-", "_"))
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        yield from _python_files(Path(folder))


def _missing(path: Path) -> InputError:
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [], n=1)
    hint = f"; did you mean {str(path.parent / near[0])!r}?" if near else ""
    return InputError(f"no file or folder {str(path)!r} to scan, nor an installed package of that name{hint}")


def _python_files(folder: Path) -> Iterator[Path]:
    """Every ``*.py`` below `folder`, but for hidden folders, caches and virtual environments."""
    for place, folders, files in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if name not in _SKIPPED and not name.startswith(".") and not os.path.exists(os.path.join(place, name, "pyvenv.cfg"))
        ]
        yield from (Path(place, name) for name in files if name.endswith(".py"))


def _read(files: Sequence[Path], of_tensors: Container[str]) -> tuple[dict[str, FileUses], dict[str, str], int]:
    """What each file uses, why those that could not be read could not, and the number of lines of all."""
    read: dict[str, FileUses] = {}
    unreadable: dict[str, str] = {}
    num_lines = 0
    for path in files:
        content = path.read_bytes()
        num_lines += content.count(b"\n")
        if not any(root.encode() in content for root in ROOTS):  # it needs no torch, whatever is in it
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what Python thinks of their escapes is not what was asked
                read[str(path)] = read_uses(content, of_tensors)
        except SyntaxError as error:
            unreadable[str(path)] = f"line {error.lineno}: {error.msg}"
        except (ValueError, RecursionError) as error:
            unreadable[str(path)] = str(error)
    return read, unreadable, num_lines


# findings


class _Findings:
    """Makes findings of judgements, and keeps what all of them `needed`, and what is `running` with the backports."""

    def __init__(self, judge: Judge, releases: int) -> None:
        self.judge = judge
        self.releases = releases
        self.needed = self.running = judge.names.all

    def of(self, path: str, uses: FileUses) -> Iterator[Finding]:
        """The findings of one file."""
        done: set[tuple[int, str]] = set()
        for use in uses.uses:
            judged = self.judge.judge(use)
            if judged is None or (use.line, judged.name) in done:
                continue
            done.add((use.line, judged.name))
            finding = self._finding(path, use, judged)
            if finding is not None:
                yield finding

    def _finding(self, path: str, use: Use, judged: Judged) -> Finding | None:
        has, provided = judged.has, judged.has | judged.provided
        if use.guard:
            standing: Standing = "guarded"
        elif not provided:
            standing = "unknown"
        else:
            self.needed &= has
            self.running &= provided
            standing = "uncovered" if self.releases & ~provided else "covered"
        if not self.releases & ~has or (standing == "guarded" and not provided):
            return None  # all releases that the scan is for have it, or it is no name of torch's, and the program knows
        names = self.judge.names
        text = f"{since(names, has)} (guarded: {use.guard})" if use.guard else says(names, judged, self.releases)
        backport = judged.backport.backport if judged.backport is not None else ""
        return Finding(path, use.line, judged.name, self.judge.releases(has), standing, text, backport, use.guard)


def _summary(judge: Judge, needed: int, releases: int, running: int, num_files: int, num_lines: int) -> str:
    """The answer in one sentence."""
    names = judge.names
    place = f"{num_files} file{'s' if num_files != 1 else ''}, {num_lines} lines"
    needs = "any torch" if needed == names.all else f"torch {_range(names, needed)}"
    text = f"{place}: needs {needs}" if needed else f"{place}: no one torch release has all that it uses"
    if running != needed & judge.supported:
        text += f"; with torchspan runs on {_range(names, running)}"
    if releases != judge.supported:
        (minor,) = judge.releases(releases)
        runs = "runs" if releases & needed else "runs with torchspan" if releases & running else "does not run"
        text += f"; {runs} on torch {minor}"
    return text


def _range(names: Names, mask: int) -> str:
    first = (mask & -mask).bit_length() - 1
    is_to_newest = mask and mask | ((1 << first) - 1) == names.all
    return f"≥ {names.minors[first]}" if is_to_newest else names.text(mask)
