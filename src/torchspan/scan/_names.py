"""The names of several torch releases: in which of them a dotted name is there, and what it accepts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torchspan.scan._database import DATABASE, Database, read_database
from torchspan.scan._lookup import Lookup

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


@dataclass(frozen=True)
class Presence:
    """In which releases a name is there: `mask`. `name` is as much of it as can be judged; beyond it stand values.

    `is_known` is False where no release has it and that tells nothing: its module makes names that no file shows.
    """

    name: str
    mask: int
    is_known: bool = True


class Names:
    """The names of several torch releases.

    >>> names = Names.load()
    >>> names.releases[0], names.text(names.look_up("torch.nn.attention.varlen").mask)
    ('2.6.0', '2.10 and newer')
    """

    def __init__(self, text: str) -> None:
        self._database = Database(text)
        self._lookup = Lookup(self._database)
        self.releases = self._database.releases
        self.all = self._database.all

    @classmethod
    def load(cls, path: Path = DATABASE) -> Names:
        """Read the database."""
        return cls(read_database(path))

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
        return name in self._database.blocks

    def modules(self) -> list[str]:
        """Every module of some release."""
        return list(self._database.blocks)

    def is_of_python(self, module: str) -> bool:
        """Whether files show all names of a module: it is neither C's nor a space of operators."""
        content = self._database.module(module)
        return content is not None and not content.is_partial

    def look_up(self, dotted: str, *, is_module: bool = False) -> Presence:
        """In which releases `dotted` is there; with `is_module`, as a module that can be imported."""
        outcomes = self._lookup.outcomes(dotted, is_module)
        mask = sum(outcome.mask for outcome in outcomes if outcome.is_there)
        consumed = max((outcome.consumed for outcome in outcomes), default=1)
        if mask == 0:
            consumed = min((outcome.consumed for outcome in outcomes), default=1)
        is_known = mask != 0 or not any(outcome.tells_nothing for outcome in outcomes)
        return Presence(".".join(dotted.split(".")[:consumed]), mask, is_known)

    def look_up_member(self, dotted: str) -> Presence:
        """In which releases an instance of a class has a member, given as ``class.member``."""
        mask, is_known = 0, False
        for its, entry in self._lookup.entries_of_member(dotted):
            mask |= 0 if entry is None else its
            is_known |= entry not in (None, "?")
        # what its class has in no release is its subclass's, also where older releases have the class elsewhere
        return Presence(dotted, mask if is_known else self.all)

    def resolve(self, path: str) -> str:
        """The dotted name that a path with calls in it means; nothing where the result of a call is not known.

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
            entries = {entry for _, entry in self._lookup.entries_of_member(dotted)}
            return not any((entry or "").startswith("(") for entry in entries) and not name.startswith("__")
        return any(outcome.is_there and outcome.entry == "#" for outcome in self._lookup.outcomes(dotted, False))

    @cached_property
    def members_of_tensors_alone(self) -> frozenset[str]:
        """Members that newer releases' tensors have, and no other class of torch or of Python: a use is known by its name."""
        of_python = {name for kind in (list, dict, str, set, object, bytes, type(re), int, Path) for name in dir(kind)}
        members = set()
        oldest, newest = 1, 1 << (len(self.releases) - 1)
        for module, owner in (("torch._C", "TensorBase"), ("torch._tensor", "Tensor")):
            block = self._database.module(module)
            for name in block.members.get(owner, ()) if block else ():
                mask = self.look_up_member(f"{_TENSOR}.{name}").mask
                if mask & newest and not mask & oldest and not name.startswith("__") and name not in of_python:
                    members.add(name)
        return frozenset(
            name for name in members if sum(block.count(f"\n.{name}\t") for block in self._database.blocks.values()) == 1
        )

    def accepting(self, dotted: str, keyword: str, *, by_name: bool = False) -> Presence:
        """In which releases the function or class `dotted` accepts `keyword`, of those that have it.

        With `by_name`, only where it is a parameter's name: not where any keyword is passed on.
        """
        mask = 0
        is_known = any(outcome.is_there for outcome in self._lookup.outcomes(dotted, False))
        length = dotted.count(".") + 1
        for outcome in self._lookup.outcomes(dotted, False):
            if not outcome.is_there:
                continue
            for its, signature in self._lookup.signatures(outcome) if outcome.consumed == length else [(outcome.mask, "?")]:
                mask |= its if _accepts(signature, keyword, by_name) else 0
                is_known = is_known and not signature.startswith("~")
        return Presence(f"{dotted}({keyword}=)", mask, mask != 0 or is_known)

    def taking(self, dotted: str, keyword: str, kind: str) -> int:
        """The releases in which the parameter `keyword` of `dotted` takes an argument of this `kind`."""
        mask = 0
        for outcome in self._lookup.outcomes(dotted, False):
            for its, signature in self._lookup.signatures(outcome) if outcome.is_there else ():
                kinds = {part.partition(":")[2] for part in signature.split(",") if part.partition(":")[0] == keyword}
                accepted = {word for part in kinds for word in part.split("|")}
                mask |= its if not accepted - {""} or accepted & _TAKEN_AS.get(kind, {kind}) else 0
        return mask

    def definitions(self, dotted: str) -> set[str]:
        """The dotted names under which what `dotted` means is defined, after aliases."""
        length = dotted.count(".") + 1
        outcomes = {
            outcome for outcome in self._lookup.outcomes(dotted, False) if outcome.is_there and outcome.consumed == length
        }
        return {f"{outcome.module}.{outcome.name}" for outcome in outcomes if outcome.name}

    def names_in(self, module: str) -> list[str]:
        """The names of a module in some release."""
        content = self._database.module(module)
        return list(content.names) if content is not None else []

    def is_configuration(self, dotted: str) -> bool:
        """Whether setting an attribute of the module or object `dotted` needs it to be there already."""
        outcomes = self._lookup.outcomes(dotted, False)
        is_in_module = not {"config", "_config"}.isdisjoint(dotted.split(".")[-2:])  # in a group of options as well
        return is_in_module or any(outcome.entry.startswith("@") for outcome in outcomes)

    def _class_given_by(self, dotted: str) -> str:
        """The class of what a call of `dotted` gives; nothing where that is not known, or not the same in all releases."""
        length = dotted.count(".") + 1
        class_names = set()
        for outcome in self._lookup.outcomes(dotted, False):
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


def _accepts(signature: str, keyword: str, by_name: bool) -> bool:
    parts = [part.partition(":")[0] for part in signature.lstrip("~").split(",")]
    if not by_name and ("?" in parts or "**" in parts):
        return True
    return keyword in (parts[parts.index("/") + 1 :] if "/" in parts else parts)
