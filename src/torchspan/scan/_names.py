"""The database of torch's names: in which releases a dotted name is there, and what it accepts.

``tools/make_names_database.py`` makes ``names.xz``; ``_module_names.py`` and ``_link_names.py`` there say what its lines mean.
A set of releases is a mask: an int with one bit for each, the oldest one lowest.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

DATABASE = Path(__file__).with_name("names.xz")
_DEPTH = 30  # of aliases that point to aliases
_TENSOR = "torch.Tensor"
_PUBLIC = {"torch._tensor.Tensor": _TENSOR}  # by which names of what they give are shown
_TAKEN_AS = {  # what else an annotation may call the kind of an argument
    "list": {"list", "List", "Sequence", "Iterable", "Collection"},
    "tuple": {"tuple", "Tuple", "Sequence", "Iterable", "Collection"},
    "set": {"set", "Iterable", "Collection"},
    "dict": {"dict", "Dict", "Mapping", "Iterable", "Collection"},
    "bool": {"bool", "int", "float"},
    "int": {"int", "float"},
}

Variants = tuple[tuple[int, str], ...]  # (mask, entry)


@dataclass(frozen=True)
class Presence:
    """In which releases a name is there: `mask`. `name` is as much of it as can be judged; beyond it stand values.

    `is_known` is False where no release has it and that tells nothing: its module makes names that no file shows.
    """

    name: str
    mask: int
    is_known: bool = True


@dataclass
class _Module:
    mask: int
    open_mask: int
    is_partial: bool
    names: dict[str, Variants] = field(default_factory=dict)
    members: dict[str, dict[str, Variants]] = field(default_factory=dict)  # of each class


@dataclass(frozen=True)
class _Outcome:
    """Where looking up a dotted name ends, in the releases of `mask`: after `consumed` parts, at `entry` in `module`."""

    mask: int
    consumed: int
    is_there: bool
    entry: str = ""
    module: str = ""
    name: str = ""
    tells_nothing: bool = False


class Names:
    """The names of several torch releases.

    >>> names = Names.load()
    >>> names.releases[0], names.text(names.look_up("torch.nn.attention.varlen").mask)
    ('2.6.0', '2.10 and newer')
    """

    def __init__(self, text: str) -> None:
        first, *blocks = text.split("\0")
        self.releases = tuple(first.split())
        self.all = (1 << len(self.releases)) - 1
        self._blocks = {block[: block.index("\t")]: block for block in blocks}
        self._modules: dict[str, _Module] = {}
        self._outcomes_by_name: dict[tuple[str, bool], list[_Outcome]] = {}

    @classmethod
    def load(cls, path: Path = DATABASE) -> Names:
        """Read the database."""
        return cls(lzma.decompress(path.read_bytes()).decode())

    @cached_property
    def minors(self) -> tuple[str, ...]:
        """The releases as ``2.8``."""
        return tuple(".".join(release.split(".")[:2]) for release in self.releases)

    def text(self, mask: int) -> str:
        """A set of releases in words."""
        indices = [index for index in range(len(self.releases)) if mask >> index & 1]
        runs: list[list[int]] = []
        for index in indices:
            if runs and runs[-1][-1] == index - 1:
                runs[-1].append(index)
            else:
                runs.append([index])
        last = len(self.releases) - 1
        parts = []
        for run in runs:
            low, high = self.minors[run[0]], self.minors[run[-1]]
            parts.append(f"{low} and newer" if run[-1] == last and len(run) > 1 else low if low == high else f"{low} to {high}")
        return ", ".join(parts) or "no release"

    def has_module(self, name: str) -> bool:
        """Whether some release has the module `name`."""
        return name in self._blocks

    def modules(self) -> list[str]:
        """Every module of some release."""
        return list(self._blocks)

    def is_of_python(self, module: str) -> bool:
        """Whether files show all names of a module: it is neither C's nor a space of operators."""
        content = self._module(module)
        return content is not None and not content.is_partial

    def look_up(self, dotted: str, *, is_module: bool = False) -> Presence:
        """In which releases `dotted` is there; with `is_module`, as a module that can be imported."""
        outcomes = self._outcomes(dotted, is_module)
        mask = sum(outcome.mask for outcome in outcomes if outcome.is_there)
        consumed = max((outcome.consumed for outcome in outcomes), default=1)
        if mask == 0:
            consumed = min((outcome.consumed for outcome in outcomes), default=1)
        is_known = mask != 0 or not any(outcome.tells_nothing for outcome in outcomes)
        return Presence(".".join(dotted.split(".")[:consumed]), mask, is_known)

    def look_up_member(self, dotted: str) -> Presence:
        """In which releases an instance of a class has a member, given as ``class.member``."""
        mask = 0
        for its, entry in self._entries_of_member(dotted):
            mask |= 0 if entry is None else its
        # what its class lacks in every release is its subclass's
        return Presence(dotted, mask or self.all)

    def resolve(self, path: str) -> str:
        """The dotted name that a path with calls in it means, where it is known what is called gives.

        >>> names = Names.load()
        >>> names.resolve("torch.nn.Linear().weight"), names.resolve("torch.save().anything")
        ('torch.nn.modules.linear.Linear.weight', '')
        """
        head, *rest = path.split("()")
        for part in rest:
            class_name = self._class_given_by(head)
            if not class_name:
                return ""
            head = class_name + part
        return head

    def is_setting(self, dotted: str) -> bool:
        """Whether a program is meant to set `dotted`: a plain constant of a module, a property, a tensor's attribute."""
        owner, _, name = dotted.rpartition(".")
        if owner == _TENSOR:
            entries = {entry for _, entry in self._entries_of_member(dotted)}
            return not any((entry or "").startswith("(") for entry in entries) and not name.startswith("__")
        return any(outcome.is_there and outcome.entry == "#" for outcome in self._outcomes(dotted, False))

    @cached_property
    def members_of_tensors_alone(self) -> frozenset[str]:
        """Members that newer releases' tensors have, and no other class of torch or of Python: a use is known by its name."""
        of_python = {name for kind in (list, dict, str, set, object, bytes, type(re), int, Path) for name in dir(kind)}
        members = set()
        oldest, newest = 1, 1 << (len(self.releases) - 1)
        for module, owner in (("torch._C", "TensorBase"), ("torch._tensor", "Tensor")):
            block = self._module(module)
            for name in block.members.get(owner, ()) if block else ():
                mask = self.look_up_member(f"{_TENSOR}.{name}").mask
                if mask & newest and not mask & oldest and not name.startswith("__") and name not in of_python:
                    members.add(name)
        return frozenset(name for name in members if sum(block.count(f"\n.{name}\t") for block in self._blocks.values()) == 1)

    def accepting(self, dotted: str, keyword: str, *, by_name: bool = False) -> Presence:
        """In which releases the function or class `dotted` accepts `keyword`, of those that have it.

        With `by_name`, only where it is a parameter's name: not where any keyword is passed on.
        """
        mask = 0
        is_known = any(outcome.is_there for outcome in self._outcomes(dotted, False))
        length = dotted.count(".") + 1
        for outcome in self._outcomes(dotted, False):
            if not outcome.is_there:
                continue
            for its, signature in self._signatures(outcome) if outcome.consumed == length else [(outcome.mask, "?")]:
                mask |= its if _accepts(signature, keyword, by_name) else 0
                is_known = is_known and not signature.startswith("~")
        return Presence(f"{dotted}({keyword}=)", mask, mask != 0 or is_known)

    def taking(self, dotted: str, keyword: str, kind: str) -> int:
        """The releases in which the parameter `keyword` of `dotted` takes an argument of this `kind`."""
        mask = 0
        for outcome in self._outcomes(dotted, False):
            for its, signature in self._signatures(outcome) if outcome.is_there else ():
                kinds = {part.partition(":")[2] for part in signature.split(",") if part.partition(":")[0] == keyword}
                accepted = {word for part in kinds for word in part.split("|")}
                mask |= its if not accepted - {""} or accepted & _TAKEN_AS.get(kind, {kind}) else 0
        return mask

    def definitions(self, dotted: str) -> set[str]:
        """The dotted names under which what `dotted` means is defined, after aliases."""
        length = dotted.count(".") + 1
        outcomes = {outcome for outcome in self._outcomes(dotted, False) if outcome.is_there and outcome.consumed == length}
        return {f"{outcome.module}.{outcome.name}" for outcome in outcomes if outcome.name}

    def names_in(self, module: str) -> list[str]:
        """The names of a module in some release."""
        content = self._module(module)
        return list(content.names) if content is not None else []

    def is_configuration(self, dotted: str) -> bool:
        """Whether setting an attribute of the module or object `dotted` needs it to be there already."""
        outcomes = self._outcomes(dotted, False)
        is_in_module = not {"config", "_config"}.isdisjoint(dotted.split(".")[-2:])  # in a group of options as well
        return is_in_module or any(outcome.entry.startswith("@") for outcome in outcomes)

    # classes and members

    def _class_given_by(self, dotted: str) -> str:
        """The class of what a call of `dotted` gives; nothing where that is not known, or not the same in all releases."""
        length = dotted.count(".") + 1
        class_names = set()
        for outcome in self._outcomes(dotted, False):
            if not outcome.is_there or outcome.consumed != length:
                continue
            if outcome.entry.startswith(":"):
                class_names.add(f"{outcome.module}.{outcome.name}")
            elif ">" in outcome.entry:
                class_names.add(outcome.entry.partition(">")[2])
        place = {self._defined(name) for name in class_names}
        return _PUBLIC.get(class_name, class_name) if len(place) == 1 and (class_name := place.pop()) else ""

    def _defined(self, dotted: str) -> str:
        return next(iter(sorted(self.definitions(dotted))), dotted)

    def _entries_of_member(self, dotted: str) -> Iterator[tuple[int, str | None]]:
        """The entries of an instance's member, by releases: None where its class lacks it, "?" where that is not known."""
        owner, _, member = dotted.rpartition(".")
        for outcome in self._owners(owner, self.all):
            if outcome.entry.startswith(":"):
                yield from self._members(outcome, member, is_instance=True)
            else:
                yield outcome.mask, "?"

    def _owners(self, dotted: str, mask: int, depth: int = 0) -> Iterator[_Outcome]:
        """The class that `dotted` is, or that it is an instance of."""
        for outcome in self._outcomes_of(dotted, mask):
            if outcome.entry.startswith("@") and depth < _DEPTH:
                yield from self._owners(outcome.entry[1:], outcome.mask, depth + 1)
            else:
                yield outcome

    # looking up

    def _outcomes(self, dotted: str, is_module: bool) -> list[_Outcome]:
        outcomes = self._outcomes_by_name.get((dotted, is_module))
        if outcomes is None:
            outcomes = list(self._as_module(dotted) if is_module else self._in_root(dotted.split("."), self.all, 0))
            self._outcomes_by_name[dotted, is_module] = outcomes
        return outcomes

    def _as_module(self, dotted: str) -> Iterator[_Outcome]:
        """A module's import needs every package above it."""
        parts = dotted.split(".")
        remaining = self.all
        for length in range(1, len(parts) + 1):
            module = self._module(".".join(parts[:length]))
            mask = module.mask if module else 0
            if remaining & ~mask:
                is_c = dotted.startswith(("torch._C.", "torch.ops", "torch.classes"))
                yield _Outcome(remaining & ~mask, length, is_c and not mask, tells_nothing=is_c)
            remaining &= mask
        if remaining:
            yield _Outcome(remaining, len(parts), True)

    def _in_root(self, parts: list[str], mask: int, depth: int) -> Iterator[_Outcome]:
        if self._module(parts[0]) is None:
            yield _Outcome(mask, 1, True, tells_nothing=True)
        else:
            yield from self._in_module(parts[0], parts, 1, mask, depth)

    def _in_module(self, name: str, parts: list[str], index: int, mask: int, depth: int) -> Iterator[_Outcome]:
        """The rest of `parts`, from `index` on, in the module `name`."""
        module = self._module(name)
        if module is None or depth > _DEPTH:
            yield _Outcome(mask, index, True, tells_nothing=True)
            return
        if mask & ~module.mask:
            yield _Outcome(mask & ~module.mask, index, False)
        mask &= module.mask
        if index == len(parts):
            if mask:
                yield _Outcome(mask, index, True, "module", name)
            return
        part = parts[index]
        below = self._module(f"{name}.{part}")
        for its, entry in module.names.get(part, ()):
            if below is not None and ((name == "torch" and part == "ops") or (_is_value(entry) and index + 1 < len(parts))):
                its &= ~below.mask  # more names follow, so what is meant is the module, which has the same name
            if entry == f"={name}.{part}":  # the module below it, or C++'s own
                entry, its = "", its if below is None else 0
            if its & mask:
                yield from self._at_entry(entry, (name, part), parts, index + 1, its & mask, depth + 1)
                mask &= ~its
        if below is not None and below.mask & mask:
            yield from self._in_module(f"{name}.{part}", parts, index + 1, below.mask & mask, depth + 1)
            mask &= ~below.mask
        if part.startswith("__") and part.endswith("__"):
            yield _Outcome(mask, index + 1, True)
        elif mask:
            # a module that may have more names in some release may there have one that others are known to have
            is_open = mask & module.open_mask if part in module.names or below is not None else 0
            tells_nothing = module.is_partial or bool(module.open_mask)
            if is_open:
                yield _Outcome(is_open, index + 1, True)
            if mask & ~is_open:
                yield _Outcome(mask & ~is_open, index + 1, False, tells_nothing=tells_nothing)

    def _at_entry(
        self, entry: str, place: tuple[str, str], parts: list[str], index: int, mask: int, depth: int
    ) -> Iterator[_Outcome]:
        """The rest of `parts` in what `entry` says, which is the name `place` and was reached after `index` parts."""
        if entry.startswith("="):
            target = entry[1:].split(".")
            for outcome in self._in_root([*target, *parts[index:]], mask, depth):
                consumed = outcome.consumed - len(target) + index
                if consumed < index or (consumed == index and not outcome.is_there):  # the name is there, whatever it is
                    yield _Outcome(outcome.mask, index, True)
                else:
                    yield _Outcome(
                        outcome.mask,
                        consumed,
                        outcome.is_there,
                        outcome.entry,
                        outcome.module,
                        outcome.name,
                        outcome.tells_nothing,
                    )
        elif index == len(parts) or not entry.startswith((":", "@")):
            yield _Outcome(mask, index, True, entry, *place)
        elif entry.startswith("@"):
            for outcome in self._outcomes_of(entry[1:], mask):
                if outcome.entry.startswith(":"):
                    yield from self._in_class(outcome, parts, index, depth, is_instance=True)
                else:
                    yield _Outcome(outcome.mask, index, True)
        else:
            yield from self._in_class(_Outcome(mask, index, True, entry, *place), parts, index, depth)

    def _outcomes_of(self, dotted: str, mask: int) -> Iterator[_Outcome]:
        length = dotted.count(".") + 1
        for outcome in self._outcomes(dotted, False):
            if outcome.mask & mask:
                is_whole = outcome.is_there and outcome.consumed == length
                yield _Outcome(
                    outcome.mask & mask, length, True, outcome.entry if is_whole else "", outcome.module, outcome.name
                )

    def _in_class(
        self, outcome: _Outcome, parts: list[str], index: int, depth: int, *, is_instance: bool = False
    ) -> Iterator[_Outcome]:
        """The rest of `parts` in a class, or in an instance of one (`outcome` is then reached by an entry with "@")."""
        for its, entry in self._members(outcome, parts[index], depth, is_instance):
            if entry is None or entry == "?":
                yield _Outcome(its, index + 1, entry == "?", tells_nothing=True)
            elif entry.startswith("@") and index + 1 < len(parts):
                yield from self._at_entry(entry, ("", ""), parts, index + 1, its, depth + 1)
            else:
                yield _Outcome(its, index + 1, True, entry)

    def _members(
        self, outcome: _Outcome, member: str, depth: int = 0, is_instance: bool = False
    ) -> Iterator[tuple[int, str | None]]:
        """The variants of a class's member: its entry, None where the class lacks it, "?" where that is not known."""
        module = self._module(outcome.module)
        assert module is not None, outcome
        mask = outcome.mask
        for its, entry in module.members.get(outcome.name, {}).get(member, ()):
            if its & mask:
                yield its & mask, entry
                mask &= ~its
        if not mask:
            return
        for base in filter(None, outcome.entry[1:].split(",")):
            if base == "*" and not is_instance:
                continue
            if base.startswith(("?", "!", "*")) or depth > _DEPTH:
                yield mask, "?"
                return
            lacking = 0
            for above in self._outcomes_of(base, mask):
                if not above.entry.startswith(":"):
                    yield above.mask, "?"
                    continue
                for its, inherited in self._members(above, member, depth + 1, is_instance):
                    if inherited is None:
                        lacking |= its
                    else:
                        yield its, inherited
            mask = lacking
        if mask:
            yield mask, None

    def _signatures(self, outcome: _Outcome) -> Iterator[tuple[int, str]]:
        """What a function or class accepts, by releases: the text after the "(" of an entry, "?" where it is not known."""
        if outcome.entry.startswith("("):
            yield outcome.mask, outcome.entry[1:].partition(">")[0]
        elif outcome.entry.startswith(":"):
            yield from self._initializers(outcome)
        else:
            yield outcome.mask, "?"

    def _initializers(self, outcome: _Outcome) -> Iterator[tuple[int, str]]:
        """What a class accepts: what its ``__init__`` does, and its ``__new__``."""
        for its, entry in self._members(outcome, "__init__"):
            for inner, other in self._members(_narrowed(outcome, its), "__new__"):
                new = "" if other is None else other[1:].partition(">")[0] if other.startswith("(") else "?"
                entry = entry.partition(">")[0] if entry else entry
                if entry is None:
                    yield inner, new or "?"
                elif entry.startswith("(+"):
                    yield from (
                        (mask, f"{own},{new}") for mask, own in self._with_inherited(_narrowed(outcome, inner), entry[2:])
                    )
                else:
                    yield inner, f"{entry[1:] if entry.startswith('(') else '?'},{new}"

    def _with_inherited(self, outcome: _Outcome, own: str) -> Iterator[tuple[int, str]]:
        """A dataclass's fields, with those of its bases."""
        mask = outcome.mask
        for base in filter(None, outcome.entry[1:].replace("*", "").split(",")):
            if base.startswith(("?", "!")):
                yield mask, "?"
                return
            for above in self._outcomes_of(base, mask):
                if not above.entry.startswith(":"):
                    yield above.mask, "?"
                    mask &= ~above.mask
                    continue
                for its, signature in self._initializers(above):
                    if signature != "?":
                        yield its, f"{signature},{own}"
                        mask &= ~its
        if mask:
            yield mask, own

    # reading

    def _module(self, name: str) -> _Module | None:
        module = self._modules.get(name)
        if module is None and name in self._blocks:
            module = self._modules[name] = _parse(self._blocks[name])
        return module


def _narrowed(outcome: _Outcome, mask: int) -> _Outcome:
    return _Outcome(mask, outcome.consumed, True, outcome.entry, outcome.module, outcome.name)


def _parse(block: str) -> _Module:
    head, *lines = block.rstrip("\n").split("\n")
    _, mask, open_mask, partial = head.split("\t")
    module = _Module(int(mask, 16), int(open_mask, 16), bool(partial))
    owner, owner_mask = "", 0
    for line in lines:
        name, _, rest = line.partition("\t")
        its_text, _, entry = rest.partition("\t")
        if name.startswith("."):
            members = module.members.setdefault(owner, {})
            its = int(its_text, 16) if its_text else owner_mask
            members[name[1:]] = (*members.get(name[1:], ()), (its, entry))
            continue
        its = int(its_text, 16) if its_text else module.mask
        if entry.startswith(":"):
            owner_mask = its if name != owner else owner_mask | its
            owner = name
        module.names[name] = (*module.names.get(name, ()), (its, entry))
    return module


def _is_value(entry: str) -> bool:
    """Whether what an entry stands for has no names that the database knows."""
    return not entry.startswith(("=", ":", "@"))


def _accepts(signature: str, keyword: str, by_name: bool) -> bool:
    parts = [part.partition(":")[0] for part in signature.lstrip("~").split(",")]
    if not by_name and ("?" in parts or "**" in parts):
        return True
    return keyword in (parts[parts.index("/") + 1 :] if "/" in parts else parts)
