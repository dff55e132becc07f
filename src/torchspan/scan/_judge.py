"""Judging one use of torch: in which releases it is there, and what a backport provides; for the scan and for `run`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from torchspan.core.errors import InputError
from torchspan.scan import _coverage
from torchspan.scan._names import Names, Presence
from torchspan.scan._uses import Use

# devices that other packages register under torch
_DEVICES_OF_OTHERS = frozenset({"cann", "gcu", "hpu", "ipu", "mlu", "mudnn", "musa", "neuron", "npu", "sdaa", "tpu"})

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


def releases_asked(names: Names, torch: str | None) -> int:
    """The releases that the scan is for."""
    if torch is None:
        return sum(1 << index for index, minor in enumerate(names.minors) if _version(minor) >= _version(_coverage.OLDEST))
    release = ".".join(torch.removeprefix("torch").lstrip("=<>~ v").partition("+")[0].split(".")[:2])
    if release in names.minors:
        return 1 << names.minors.index(release)
    close = difflib.get_close_matches(torch, names.minors, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise InputError(
        f"no torch release {torch!r}; expected one from {names.minors[0]} to {names.minors[-1]}, such as 2.8{hint}"
    )


def _version(minor: str) -> tuple[int, ...]:
    return tuple(int(part) for part in minor.split("."))


@dataclass(frozen=True)
class Judged:
    """A name that some release lacks: the releases that have it, and those in which `backport` provides it."""

    name: str
    has: int
    provided: int = 0
    backport: _coverage.Provided | None = None


class Judge:
    """Judges uses of torch by its names in each release and by the backports; what the program `sets` on torch is no need."""

    def __init__(self, names: Names, sets: Iterable[str] = ()) -> None:
        self.names = names
        self.supported = releases_asked(names, None)
        self.sets = {name for name in sets if not self._is_need_where_set(name)}
        self._judged: dict[Use, Judged | None] = {}

    @cached_property
    def provided(self) -> list[_coverage.Provided]:
        """What every backport provides."""
        return _coverage.provided()

    def releases(self, mask: int) -> tuple[str, ...]:
        """The releases of a mask, as ``2.8``."""
        return tuple(minor for index, minor in enumerate(self.names.minors) if mask >> index & 1)

    def judge(self, use: Use) -> Judged | None:
        """In which releases what is used is there; None where all have it, or where that cannot be told."""
        key = replace(use, line=0, guard="")
        if key not in self._judged:
            name = self.names.resolve(use.name)
            self._judged[key] = self._judge_name(replace(key, name=name)) if name else None
        return self._judged[key]

    def _judge_name(self, use: Use) -> Judged | None:
        if self._is_set_here(use.name):
            return None
        if use.kind in ("store", "set") and not self._is_need_where_set(use.name):
            return None
        presence = (
            self.names.look_up_member(use.name)
            if use.kind in ("member", "set")
            else self.names.look_up(use.name, is_module=use.kind == "module")
        )
        name, mask = presence.name, presence.mask
        if use.keyword:
            if mask == 0:
                return None  # the function is a finding of its own
            presence, name = self._accepting(use)
            has_function, mask = mask, presence.mask
            if mask & has_function == has_function:
                return None
        if mask == self.names.all or (mask == 0 and not presence.is_known):
            return None
        if mask == 0 and name.rpartition(".")[2] in _DEVICES_OF_OTHERS:
            return None
        return Judged(name, mask, *self._coverage_of(use, name))

    def _is_need_where_set(self, name: str) -> bool:
        """Whether to set `name` means something only where torch knows it: an option, a setting."""
        return self.names.is_configuration(name.rpartition(".")[0]) or self.names.is_setting(name)

    def _accepting(self, use: Use) -> tuple[Presence, str]:
        """In which releases a function accepts an argument: itself, or the one that it passes it on to; and what to call it."""
        name = f"{use.name}({use.keyword}=)"
        presence = self.names.accepting(use.name, use.keyword)
        if not self.names.definitions(use.name).isdisjoint(_PASSES_ON):
            named = self.names.accepting(_CHECKPOINT, use.keyword, by_name=True).mask
            presence = replace(presence, mask=presence.mask & named) if named else presence
        if use.argument:
            taking = self.names.taking(use.name, use.keyword, use.argument)
            if presence.mask & ~taking and presence.mask & taking:
                return replace(presence, mask=presence.mask & taking), f"{use.name}({use.keyword}={use.argument})"
        return presence, name

    def _coverage_of(self, use: Use, name: str) -> tuple[int, _coverage.Provided | None]:
        """In which releases a backport provides what is used, and which one."""
        places = {use.name, *(() if use.keyword else (name,)), *self.names.definitions(use.name)}
        places |= {f"{owner}.{name.rpartition('.')[2]}" for owner in self.names.definitions(use.name.rpartition(".")[0])}
        places |= {_PASSES_ON[place] for place in places if use.keyword and place in _PASSES_ON}
        lacking = self.supported & ~self.names.look_up(use.name).mask
        for index, entry in enumerate(self.provided):
            if any(entry.may_cover(place) for place in places):
                entry = self.provided[index] = _coverage.imported(entry)
            mask = 0
            if not use.keyword:
                mask = self.supported if any(entry.covers_name(place) for place in places) else 0
            elif any(entry.covers_keyword(place, use.keyword) for place in places):
                mask = self.supported
            elif use.keyword in entry.words and any(entry.covers_name(place) for place in places):
                mask = lacking  # where torch has the name it is torch's own, without the argument
            if mask:
                refusal = next(filter(None, map(entry.refuses, places)), "")
                return (0 if refusal else mask), replace(entry, impossible=refusal)
        return 0, None

    def _is_set_here(self, name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:length]) in self.sets for length in range(2, len(parts) + 1))


def says(names: Names, judged: Judged, releases: int) -> str:
    """What a judgement means for a program that uses the name on these `releases`."""
    uncovered = releases & ~judged.has & ~judged.provided
    if not judged.has and not judged.provided:
        return since(names, judged.has)
    return since(names, judged.has) + (_says_uncovered(names, uncovered, judged) if uncovered else _says_covered(judged))


def since(names: Names, mask: int) -> str:
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


def _says_covered(judged: Judged) -> str:
    return f" — covered by backport {judged.backport.backport}" if judged.backport is not None else ""


def _says_uncovered(names: Names, uncovered: int, judged: Judged) -> str:
    if judged.name in _NEWER:
        return f" — not covered: write {_NEWER[judged.name]}, for any torch (docs/precompile_migration.md)"
    if judged.backport is None:
        return " — not covered"
    if judged.backport.impossible:
        return f" — not covered: backport {judged.backport.backport}: {judged.backport.impossible}"
    return f" — not covered on torch {names.text(uncovered)}"
