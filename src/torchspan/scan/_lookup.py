"""Where a dotted name leads, in each release: through modules, aliases, classes and their bases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torchspan.scan._database import Database

_DEPTH = 30  # of aliases that point to aliases


@dataclass(frozen=True)
class Outcome:
    """Where looking up a dotted name ends, in the releases of `mask`: after `consumed` parts, at `entry` in `module`."""

    mask: int
    consumed: int
    is_there: bool
    entry: str = ""
    module: str = ""
    name: str = ""
    tells_nothing: bool = False


class Lookup:
    """Looks dotted names up in a database, each once."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._outcomes_by_name: dict[tuple[str, bool], list[Outcome]] = {}

    def outcomes(self, dotted: str, is_module: bool) -> list[Outcome]:
        """Where `dotted` leads in all releases; with `is_module`, whether it can be imported as a module."""
        outcomes = self._outcomes_by_name.get((dotted, is_module))
        if outcomes is None:
            outcomes = list(self._as_module(dotted) if is_module else self._in_root(dotted.split("."), self._database.all, 0))
            self._outcomes_by_name[dotted, is_module] = outcomes
        return outcomes

    def _as_module(self, dotted: str) -> Iterator[Outcome]:
        """A module's import needs every package above it."""
        parts = dotted.split(".")
        remaining = self._database.all
        for length in range(1, len(parts) + 1):
            module = self._database.module(".".join(parts[:length]))
            mask = module.mask if module else 0
            if remaining & ~mask:
                is_c = dotted.startswith(("torch._C.", "torch.ops", "torch.classes"))
                yield Outcome(remaining & ~mask, length, is_c and not mask, tells_nothing=is_c)
            remaining &= mask
        if remaining:
            yield Outcome(remaining, len(parts), True)

    def _in_root(self, parts: list[str], mask: int, depth: int) -> Iterator[Outcome]:
        if self._database.module(parts[0]) is None:
            yield Outcome(mask, 1, True, tells_nothing=True)
        else:
            yield from self._in_module(parts[0], parts, 1, mask, depth)

    def _in_module(self, name: str, parts: list[str], index: int, mask: int, depth: int) -> Iterator[Outcome]:
        """The rest of `parts`, from `index` on, in the module `name`."""
        module = self._database.module(name)
        if module is None or depth > _DEPTH:
            yield Outcome(mask, index, True, tells_nothing=True)
            return
        if mask & ~module.mask:
            yield Outcome(mask & ~module.mask, index, False)
        mask &= module.mask
        if index == len(parts):
            if mask:
                yield Outcome(mask, index, True, "module", name)
            return
        part = parts[index]
        below = self._database.module(f"{name}.{part}")
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
            yield Outcome(mask, index + 1, True)
        elif mask:
            # a module that may have more names in some release may there have one that others are known to have
            is_open = mask & module.open_mask if part in module.names or below is not None else 0
            tells_nothing = module.is_partial or bool(module.open_mask)
            if is_open:
                yield Outcome(is_open, index + 1, True)
            if mask & ~is_open:
                yield Outcome(mask & ~is_open, index + 1, False, tells_nothing=tells_nothing)

    def _at_entry(
        self, entry: str, place: tuple[str, str], parts: list[str], index: int, mask: int, depth: int
    ) -> Iterator[Outcome]:
        """The rest of `parts` in what `entry` says, which is the name `place` and was reached after `index` parts."""
        if entry.startswith("="):
            target = entry[1:].split(".")
            for outcome in self._in_root([*target, *parts[index:]], mask, depth):
                consumed = outcome.consumed - len(target) + index
                if consumed < index or (consumed == index and not outcome.is_there):  # the name is there, whatever it is
                    yield Outcome(outcome.mask, index, True)
                else:
                    yield Outcome(
                        outcome.mask,
                        consumed,
                        outcome.is_there,
                        outcome.entry,
                        outcome.module,
                        outcome.name,
                        outcome.tells_nothing,
                    )
        elif index == len(parts) or not entry.startswith((":", "@")):
            yield Outcome(mask, index, True, entry, *place)
        elif entry.startswith("@"):
            for outcome in self.outcomes_of(entry[1:], mask):
                if outcome.entry.startswith(":"):
                    yield from self._in_class(outcome, parts, index, depth, is_instance=True)
                else:
                    yield Outcome(outcome.mask, index, True)
        else:
            yield from self._in_class(Outcome(mask, index, True, entry, *place), parts, index, depth)

    def outcomes_of(self, dotted: str, mask: int) -> Iterator[Outcome]:
        """What `dotted` as a whole is, in the releases of `mask`; without an entry where it leads nowhere."""
        length = dotted.count(".") + 1
        for outcome in self.outcomes(dotted, False):
            if outcome.mask & mask:
                is_whole = outcome.is_there and outcome.consumed == length
                yield Outcome(
                    outcome.mask & mask, length, True, outcome.entry if is_whole else "", outcome.module, outcome.name
                )

    def _in_class(
        self, outcome: Outcome, parts: list[str], index: int, depth: int, *, is_instance: bool = False
    ) -> Iterator[Outcome]:
        """The rest of `parts` in a class, or in an instance of one (`outcome` is then reached by an entry with "@")."""
        for its, entry in self._members(outcome, parts[index], depth, is_instance):
            if entry is None or entry == "?":
                yield Outcome(its, index + 1, entry == "?", tells_nothing=True)
            elif entry.startswith("@") and index + 1 < len(parts):
                yield from self._at_entry(entry, ("", ""), parts, index + 1, its, depth + 1)
            else:
                yield Outcome(its, index + 1, True, entry)

    def _members(
        self, outcome: Outcome, member: str, depth: int = 0, is_instance: bool = False
    ) -> Iterator[tuple[int, str | None]]:
        """The variants of a class's member: its entry, None where the class lacks it, "?" where that is not known."""
        module = self._database.module(outcome.module)
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
            for above in self.outcomes_of(base, mask):
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

    def signatures(self, outcome: Outcome) -> Iterator[tuple[int, str]]:
        """What a function or class accepts, by releases: the text after the "(" of an entry, "?" where it is not known."""
        if outcome.entry.startswith("("):
            yield outcome.mask, outcome.entry[1:].partition(">")[0]
        elif outcome.entry.startswith(":"):
            yield from self._initializers(outcome)
        else:
            yield outcome.mask, "?"

    def _initializers(self, outcome: Outcome) -> Iterator[tuple[int, str]]:
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

    def _with_inherited(self, outcome: Outcome, own: str) -> Iterator[tuple[int, str]]:
        """A dataclass's fields, with those of its bases."""
        mask = outcome.mask
        for base in filter(None, outcome.entry[1:].replace("*", "").split(",")):
            if base.startswith(("?", "!")):
                yield mask, "?"
                return
            for above in self.outcomes_of(base, mask):
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

    def entries_of_member(self, dotted: str) -> Iterator[tuple[int, str | None]]:
        """The entries of an instance's member, by releases: None where its class lacks it, "?" where that is not known."""
        owner, _, member = dotted.rpartition(".")
        for outcome in self._owners(owner, self._database.all):
            if outcome.entry.startswith(":"):
                yield from self._members(outcome, member, is_instance=True)
            else:
                yield outcome.mask, "?"

    def _owners(self, dotted: str, mask: int, depth: int = 0) -> Iterator[Outcome]:
        """The class that `dotted` is, or that it is an instance of."""
        for outcome in self.outcomes_of(dotted, mask):
            if outcome.entry.startswith("@") and depth < _DEPTH:
                yield from self._owners(outcome.entry[1:], outcome.mask, depth + 1)
            else:
                yield outcome


def _narrowed(outcome: Outcome, mask: int) -> Outcome:
    return Outcome(mask, outcome.consumed, True, outcome.entry, outcome.module, outcome.name)


def _is_value(entry: str) -> bool:
    """Whether what an entry stands for has no names that the database knows."""
    return not entry.startswith(("=", ":", "@"))
