"""The scan: every use of torch in a code base, judged by the database and by what the backports provide."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torchspan.core.errors import InputError
from torchspan.scan import _coverage
from torchspan.scan._names import Names, Presence
from torchspan.scan._uses import ROOTS, FileUses, Use, read_uses

# devices that other packages register under torch
_DEVICES_OF_OTHERS = frozenset({"cann", "gcu", "hpu", "ipu", "mlu", "mudnn", "musa", "neuron", "npu", "sdaa", "tpu"})
_SKIPPED = frozenset({"__pycache__", "node_modules"})

# functions that pass any keyword on to another one, which takes those that it names
_CHECKPOINT = "torch.utils.checkpoint.checkpoint"
_WRAPPER = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"
_PASSES_ON = {
    f"{_WRAPPER}.checkpoint_wrapper": f"{_WRAPPER}.CheckpointWrapper",
    f"{_WRAPPER}.CheckpointWrapper": _CHECKPOINT,
    _CHECKPOINT: "",
}

# what is written anew rather than provided
_NEWER = {
    "torch.compiler.load_compiled_function": "torchspan.load(path, model)",
    "torch._dynamo.aot_compile": "torchspan.precompile(model, args).save(path)",
}

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
    """What a scan found. `needs` are the releases that every unguarded use is in, `runs` those with torchspan's backports."""

    findings: tuple[Finding, ...]
    asked: tuple[str, ...]
    needs: tuple[str, ...]
    runs: tuple[str, ...]
    num_files: int
    num_lines: int
    unreadable: Mapping[str, str] = field(default_factory=dict)
    summary: str = ""

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
        paths: files, and folders that are searched for ``*.py``.
        torch: a release such as ``2.8``: only what that one lacks is found. By default each release that torchspan runs on.

    Raises:
        InputError: a path that is not there, no Python file in any, a torch that the database does not know, or no file that
            can be read.
    """
    names = Names.load()
    asked = _asked(names, torch)
    files = list(_files(paths))
    read, unreadable, num_lines = _read(files)
    if unreadable and len(unreadable) == len(files):
        first, reason = next(iter(unreadable.items()))
        raise InputError(f"none of {len(files)} files can be read; {first}: {reason}")
    judge = _Judge(names, asked, {name for uses in read.values() for name in uses.sets})
    findings = [finding for path, uses in read.items() for finding in judge.findings(path, uses)]
    running = judge.running & judge.supported
    return Scan(
        findings=tuple(findings),
        asked=judge.releases(asked),
        needs=judge.releases(judge.needed),
        runs=judge.releases(running),
        num_files=len(files),
        num_lines=num_lines,
        unreadable=unreadable,
        summary=_summary(names, judge, asked, running, len(files), num_lines),
    )


def _asked(names: Names, torch: str | None) -> int:
    """The releases that the scan is for."""
    if torch is None:
        return sum(1 << index for index, minor in enumerate(names.minors) if _version(minor) >= _version(_coverage.OLDEST))
    wanted = ".".join(torch.removeprefix("torch").lstrip("=<>~ v").partition("+")[0].split(".")[:2])
    if wanted in names.minors:
        return 1 << names.minors.index(wanted)
    close = difflib.get_close_matches(torch, names.minors, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise InputError(
        f"no torch release {torch!r}; expected one from {names.minors[0]} to {names.minors[-1]}, such as 2.8{hint}"
    )


def _version(minor: str) -> tuple[int, ...]:
    return tuple(int(part) for part in minor.split("."))


# files


def _files(paths: Sequence[str | os.PathLike[str]]) -> Iterator[Path]:
    seen: set[Path] = set()
    for path in map(Path, paths):
        if not path.exists():
            raise _missing(path)
        found = sorted(_python_files(path)) if path.is_dir() else [path]
        if not found:
            raise InputError(f"no Python file in {str(path)!r}; expected a folder with *.py files, or a file")
        for file in found:
            if file not in seen:
                seen.add(file)
                yield file


def _missing(path: Path) -> InputError:
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [], n=1)
    hint = f"; did you mean {str(path.parent / near[0])!r}?" if near else ""
    return InputError(f"no file or folder {str(path)!r} to scan{hint}")


def _python_files(folder: Path) -> Iterator[Path]:
    """Every ``*.py`` below `folder`, but for hidden folders, caches and virtual environments."""
    for place, folders, files in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if name not in _SKIPPED and not name.startswith(".") and not os.path.exists(os.path.join(place, name, "pyvenv.cfg"))
        ]
        yield from (Path(place, name) for name in files if name.endswith(".py"))


def _read(files: Sequence[Path]) -> tuple[dict[str, FileUses], dict[str, str], int]:
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
                read[str(path)] = read_uses(content)
        except SyntaxError as error:
            unreadable[str(path)] = f"line {error.lineno}: {error.msg}"
        except (ValueError, RecursionError) as error:
            unreadable[str(path)] = str(error)
    return read, unreadable, num_lines


# judging


class _Judge:
    """Judges uses for the releases `asked`; what the program `sets` on torch itself is no need."""

    def __init__(self, names: Names, asked: int, sets: set[str]) -> None:
        self.names = names
        self.asked = asked
        self.supported = _asked(names, None)
        self.sets = {name for name in sets if not names.is_configuration(name.rpartition(".")[0])}
        self.needed = self.running = names.all
        self._judged: dict[tuple[str, str, str], _Judged | None] = {}

    @cached_property
    def provided(self) -> list[_coverage.Provided]:
        return _coverage.provided()

    def releases(self, mask: int) -> tuple[str, ...]:
        return tuple(minor for index, minor in enumerate(self.names.minors) if mask >> index & 1)

    def findings(self, path: str, uses: FileUses) -> Iterator[Finding]:
        done: set[tuple[int, str]] = set()
        for use in uses.uses:
            judged = self._judge(use)
            if judged is None or (use.line, judged.name) in done:
                continue
            done.add((use.line, judged.name))
            finding = self._finding(path, use, judged)
            if finding is not None:
                yield finding

    def _judge(self, use: Use) -> _Judged | None:
        key = (use.name, use.kind, use.keyword)
        if key not in self._judged:
            self._judged[key] = self._judge_name(use)
        return self._judged[key]

    def _judge_name(self, use: Use) -> _Judged | None:
        """In which releases what is used is there; None where all have it, or where that cannot be told."""
        if self._is_set_here(use.name):
            return None
        if use.kind == "store" and not self.names.is_configuration(use.name.rpartition(".")[0]):
            return None
        is_member = use.kind == "member"
        found = (
            self.names.look_up_member(use.name) if is_member else self.names.look_up(use.name, is_module=use.kind == "module")
        )
        name, mask = found.name, found.mask
        if use.keyword:
            if mask == 0:
                return None  # the function is a finding of its own
            found = self._accepting(use)
            name, has_function = f"{use.name}({use.keyword}=)", mask
            mask = found.mask
            if mask & has_function == has_function:
                return None
        if mask == self.names.all or (mask == 0 and not found.is_known):
            return None
        if mask == 0 and name.rpartition(".")[2] in _DEVICES_OF_OTHERS:
            return None
        return _Judged(name, mask, *self._coverage_of(use, name))

    def _accepting(self, use: Use) -> Presence:
        """In which releases a function accepts a keyword: itself, or the one that it passes it on to."""
        found = self.names.accepting(use.name, use.keyword)
        if not self.names.definitions(use.name).isdisjoint(_PASSES_ON):
            named = self.names.accepting(_CHECKPOINT, use.keyword, by_name=True).mask
            return replace(found, mask=found.mask & named) if named else found
        return found

    def _coverage_of(self, use: Use, name: str) -> tuple[int, _coverage.Provided | None]:
        """In which releases a backport provides what is used, and which one."""
        places = {use.name, *(() if use.keyword else (name,)), *self.names.definitions(use.name)}
        places |= {_PASSES_ON[place] for place in places if use.keyword and place in _PASSES_ON}
        lacking = self.supported & ~self.names.look_up(use.name).mask
        for index, one in enumerate(self.provided):
            if any(one.may_cover(place) for place in places):
                one = self.provided[index] = _coverage.imported(one)
            mask = 0
            if not use.keyword:
                mask = self.supported if any(one.covers_name(place) for place in places) else 0
            elif any(one.covers_keyword(place, use.keyword) for place in places):
                mask = self.supported
            elif use.keyword in one.words and any(one.covers_name(place) for place in places):
                mask = lacking  # where torch has the name it is torch's own, without the argument
            if mask:
                refusal = next(filter(None, map(one.refuses, places)), "")
                return (0 if refusal else mask), replace(one, impossible=refusal)
        return 0, None

    def _is_set_here(self, name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:length]) in self.sets for length in range(2, len(parts) + 1))

    def _finding(self, path: str, use: Use, judged: _Judged) -> Finding | None:
        has, provided = judged.has, judged.has | judged.provided
        uncovered = self.asked & ~provided
        backport = judged.backport.backport if judged.backport is not None else ""
        if use.guard:
            standing: Standing = "guarded"
        elif not provided:
            standing = "unknown"
        else:
            self.needed &= has
            self.running &= provided
            standing = "uncovered" if uncovered else "covered"
        if not self.asked & ~has or (standing == "guarded" and not provided):
            return None  # all releases that the scan is for have it, or it is no name of torch's, and the program knows
        says = _says(self.names, has)
        if standing == "guarded":
            says += f" (guarded: {use.guard})"
        elif standing == "covered":
            says += f" — covered by backport {backport}"
        elif standing == "uncovered":
            says += _says_uncovered(self.names, uncovered, judged)
        return Finding(path, use.line, judged.name, self.releases(has), standing, says, backport, use.guard)


@dataclass(frozen=True)
class _Judged:
    """A name that some release lacks: the releases that have it, and those in which `backport` provides it."""

    name: str
    has: int
    provided: int = 0
    backport: _coverage.Provided | None = None


def _says(names: Names, mask: int) -> str:
    """What a name's releases mean for a program that uses it."""
    last = len(names.minors) - 1
    indices = [index for index in range(last + 1) if mask >> index & 1]
    if not indices:
        return "is in no torch release"
    is_run = indices == list(range(indices[0], indices[-1] + 1))
    if is_run and indices[-1] == last:
        return f"needs torch ≥ {names.minors[indices[0]]}"
    if is_run and indices[0] == 0:
        return f"is gone since torch {names.minors[indices[-1] + 1]}"
    return f"is in torch {names.text(mask)} only"


def _says_uncovered(names: Names, uncovered: int, judged: _Judged) -> str:
    if judged.name in _NEWER:
        return f" — not covered: write {_NEWER[judged.name]}, for any torch (docs/precompile_migration.md)"
    if judged.backport is None:
        return " — not covered"
    if judged.backport.impossible:
        return f" — not covered: backport {judged.backport.backport}: {judged.backport.impossible}"
    return f" — not covered on torch {names.text(uncovered)}"


def _summary(names: Names, judge: _Judge, asked: int, running: int, num_files: int, num_lines: int) -> str:
    """The answer in one sentence."""
    place = f"{num_files} file{'s' if num_files != 1 else ''}, {num_lines} lines"
    needs = "any torch" if judge.needed == names.all else f"torch {_range(names, judge.needed)}"
    text = f"{place}: needs {needs}" if judge.needed else f"{place}: no one torch release has all that it uses"
    if running != judge.needed & judge.supported:
        text += f"; with torchspan runs on {_range(names, running)}"
    if asked != judge.supported:
        (minor,) = judge.releases(asked)
        runs = "runs" if asked & judge.needed else "runs with torchspan" if asked & running else "does not run"
        text += f"; {runs} on torch {minor}"
    return text


def _range(names: Names, mask: int) -> str:
    first = (mask & -mask).bit_length() - 1
    is_to_newest = mask and mask | ((1 << first) - 1) == names.all
    return f"≥ {names.minors[first]}" if is_to_newest else names.text(mask)
