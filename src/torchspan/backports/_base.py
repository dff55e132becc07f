"""What a backport says of itself, and how it becomes Patches."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from torchspan.core.errors import InputError, UnsupportedError, unknown_name
from torchspan.core.registry import Registry
from torchspan.core.report import current_report, user_site
from torchspan.environment.patch import MissingModule, MissingName, Patch, Redefinition, Replacement

REGISTRY = Registry("torchspan.backports", "backport")

INDEX = Path(__file__).with_name("_index.json")

Standing = Literal["native", "backported", "not possible here"]


@dataclass(frozen=True)
class Change:
    """What a backport changes elsewhere in torch, so that its names work: `attribute` of the module `target`.

    `build` makes the new object from the old one; an attribute or module that this torch lacks is left alone. With `create`,
    an attribute that the module lacks is made: `build` is given None. With `always`, `build` is asked on every torch, also on
    one that has the backport's names: it looks at the old object, and returns it where it is complete.
    """

    target: str
    attribute: str
    build: Callable[[Any], object]
    create: bool = False
    always: bool = False


@dataclass(frozen=True)
class Backport:
    """One thing that a newer torch has.

    `since` is the first torch release that has it (none if torch has none), `upstream` a link to the change that brought it,
    `differs` what is not as upstream's. `came` are names that came in other releases: by the first that has them, or by the
    first and the last (``2.11 to 2.13``); a name is one of `target`'s, or dotted. `first_forms` says of releases (``2.10,
    2.11``) that have it in a first form what that form does otherwise. `names` are built in the module `target` where it
    lacks them; with `is_module`, the module itself is what is missing. `elsewhere` are names that belong to it in other
    modules, which are made where this torch lacks them. `replaces` are changes to what is there in `target` (such as a
    function that lacks an argument); `redefines` are the same for functions that other modules hold too, which stay the
    objects they are. `also` are changes elsewhere that the rest needs, made when the module in question is imported.

    `lacks` says whether this torch needs all that, given the module `target` (None if it does not exist); by default it does
    where `target` has none of `names` (with `is_module`, not all). `impossible` gives the reason why it cannot work here, or
    None: then its names can be imported, and their use is an error that says so, since when torch has it, and what to do
    `instead`.
    """

    name: str
    summary: str
    target: str
    since: str = ""
    upstream: str = ""
    differs: str = "nothing known"
    came: Mapping[str, Sequence[str]] = field(default_factory=dict)
    first_forms: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    is_module: bool = False
    elsewhere: Mapping[str, Mapping[str, Callable[[], object]]] = field(default_factory=dict)
    replaces: Mapping[str, Callable[[Any], object]] = field(default_factory=dict)
    redefines: Mapping[str, Callable[[Any], Callable[..., Any]]] = field(default_factory=dict)
    also: Sequence[Change] = ()
    lacks: Callable[[ModuleType | None], bool] | None = None
    impossible: Callable[[], str | None] = lambda: None
    instead: str = ""

    @property
    def reason(self) -> str:
        """Why it was put in: the text of the Decision."""
        return self.reason_of("")

    def reason_of(self, module: str, attribute: str = "") -> str:
        """Why a name, or a whole module, was put in: which releases of torch have it."""
        period = self.period_of(module, attribute)
        if not period[:1].isdigit():
            return f"torch has it in {period}" if period else "no torch has it there"
        return f"torch {period} have it" if " to " in period else f"torch has it since {period}"

    def first_form(self, release: str) -> str:
        """What torch `release`, which has it in a first form, does otherwise; empty for the others."""
        minor = ".".join(release.split(".")[:2])
        return next((text for releases, text in self.first_forms.items() if minor in releases.split(", ")), "")

    def period_of(self, module: str, attribute: str) -> str:
        """The releases that have a name, or a module, as `came` and `since` say them."""
        called = {module, f"{module}.{attribute}"} | ({attribute} if module == self.target else set())
        return next((period for period, names in self.came.items() if not called.isdisjoint(names)), self.since)

    def patches(self) -> Iterable[Patch]:
        """The Patches that provide it; where torch has it, they change nothing."""
        if self.is_module:
            yield MissingModule(self.name, self.target, self._build_module, self.reason)
        for attribute in self.names:  # a torch that has the module may still lack some
            reason = self.reason_of(self.target, attribute)
            yield MissingName(self.name, self.target, attribute, partial(self._build_name, attribute), reason)
        for module, names in self.elsewhere.items():
            yield MissingModule(self.name, module, partial(self._build_module, module), self.reason_of(module))
            for attribute in names:
                reason = self.reason_of(module, attribute)
                yield MissingName(self.name, module, attribute, partial(self._build_name, attribute, module), reason)
        for attribute, rebuild in self.replaces.items():
            yield Replacement(self.name, self.target, attribute, self._where_lacking(rebuild))
        for attribute, redefine in self.redefines.items():
            yield Redefinition(self.name, self.target, attribute, self._where_lacking(redefine))
        for change in self.also:
            build = change.build if change.always else self._where_lacking(change.build)
            yield Replacement(self.name, change.target, change.attribute, build, change.create)

    def record_use(self, subject: str) -> None:
        """Record that a changed function did what torch's own could not; for what no look-up of a name shows."""
        import torch

        report = current_report()
        if report is not None:
            first = self.first_form(torch.__version__)
            reason = f"what torch {torch.__version__} has is a first form: {first}" if first else self.reason
            report.decide("backport", subject, f"torchspan's {self.name}", reason, user_site())

    def _where_lacking(self, build: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def change(old: Any) -> object:
            # what torch has is not imported to look into it, and not looked into half imported: this may be amid an import
            is_there = self.is_module and not _is_imported(self.target) and _native_spec(self.target) is not None
            return old if is_there or not is_lacking(self) else build(old)

        return change

    def _build_module(self, module: str = "") -> Mapping[str, object]:
        return {name: self._build_name(name, module) for name in (self.elsewhere[module] if module else self.names)}

    def _build_name(self, attribute: str, module: str = "") -> object:
        cause = self.impossible()
        if cause is None:
            built = (self.elsewhere[module] if module else self.names)[attribute]()
        else:
            place = module or self.target
            built = unavailable(f"{place}.{attribute}", cause, self.period_of(place, attribute), self.instead)
        if not module:
            _built[self.name, attribute] = built
        return built


@dataclass(frozen=True)
class Shim(Backport):
    """A module of a program's own making, where no other provides the module `target`."""

    factory: Callable[[], ModuleType | Mapping[str, object]] = dict

    def _build_module(self, module: str = "") -> Mapping[str, object]:
        content = self.factory()
        names = vars(content) if isinstance(content, ModuleType) else content
        return {name: value for name, value in names.items() if not (name.startswith("__") and name.endswith("__"))}


def from_module(module: str, *names: str) -> dict[str, Callable[[], object]]:
    """`names` as Backport takes them, found in the Python `module`, which is imported when the first is asked for.

    >>> from_module("math", "tau")["tau"]()
    6.283185307179586
    """

    def find(name: str) -> object:
        return getattr(importlib.import_module(module), name)

    return {name: partial(find, name) for name in names}


def unavailable(name: str, cause: str, since: str, instead: str = "") -> type:
    """What stands for the dotted `name` where this torch cannot carry it: it can be imported and subclassed.

    Its use, a call, raises UnsupportedError with the `cause`, the torch release that has it, and what to do `instead`.

    >>> unavailable("torch.thing", "no such operator", "2.10.0", "use torch.other")()
    Traceback (most recent call last):
    torchspan.core.errors.UnsupportedError: torch.thing: no such operator; torch has it since 2.10.0; use torch.other
    """
    place, _, last = name.rpartition(".")
    message = "; ".join(part for part in (f"{name}: {cause}", f"torch has it since {since}", instead) if part)

    def refuse(cls: type, *args: object, **kwargs: object) -> object:
        report = current_report()
        if report is not None:
            report.decide("unsupported", name, "an error", cause, user_site())
        raise UnsupportedError(message)

    return type(last, (), {"__new__": refuse, "__module__": place, "__doc__": f"Not possible here. {message}."})


_built: dict[tuple[str, str], object] = {}  # what stands in a torch module and is ours, by backport and attribute


def is_lacking(backport: Backport) -> bool:
    """Whether this torch itself lacks what `backport` provides; says the same while it is in force."""
    module = _native_module(backport.target)
    if backport.lacks is not None:
        return backport.lacks(module)
    if module is None:
        return True
    there = vars(module)
    is_there = (name in there and there[name] is not _built.get((backport.name, name)) for name in backport.names)
    return not (all if backport.is_module else any)(is_there)


def has_module(name: str) -> bool:
    """Whether torch itself has the module `name`; says the same while a backport stands in its place.

    >>> has_module("torch.nn"), has_module("torch.no_such_module")
    (True, False)
    """
    return _native_spec(name) is not None


def _native_module(name: str) -> ModuleType | None:
    """The module `name` of torch itself, imported; None where torch has none, even if ours stands in its place."""
    return None if _native_spec(name) is None else importlib.import_module(name)


def _native_spec(name: str) -> ModuleSpec | None:
    """Where torch has the module `name`; None where it has none, even if ours stands in its place."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # not even the package that it would be in
        return None
    except ValueError:  # torch put an object in the module's place, which has no spec
        return ModuleSpec(name, None)
    return None if spec is None or spec.origin == "torchspan" else spec


def _is_imported(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


def status(backport: Backport) -> tuple[Standing, str]:
    """How this torch stands to `backport`, and why; activates nothing.

    ``native``: torch has it, if only in a first form; ``backported``: ours takes its place once activated, or completes
    torch's; ``not possible here``: neither.
    """
    import torch

    first = _first_form(backport, torch.__version__)
    if not is_lacking(backport):
        return "native", first or f"torch {torch.__version__} has it" + (f" (since {backport.since})" if backport.since else "")
    reason = backport.impossible()
    if reason is not None:
        return "not possible here", reason
    return "backported", first or f"torch {torch.__version__} lacks it; {backport.reason}"


def _first_form(backport: Backport, release: str) -> str:
    """That torch `release` has it in a first form, and what that lacks and does otherwise; nothing where it is not so."""
    otherwise = backport.first_form(release)
    came_before = backport.since[:1].isdigit() and _minor(backport.since) <= _minor(release)
    if not otherwise and not (came_before and is_lacking(backport)):
        return ""
    later: dict[str, list[str]] = {}
    for place, names in ({backport.target: backport.names} | dict(backport.elsewhere)).items():
        for name in names:
            period = backport.period_of(place, name)
            if period[:1].isdigit() and _minor(period) > _minor(release):
                later.setdefault(period, []).append(name)
    without = ", ".join(f"{_listed(names)} (since {period})" for period, names in later.items())
    since = f", since {backport.since}" if came_before else ""
    says = f"torch {release} has a first form of it{since}" + (f", without {without}" if without else "")
    return f"{says}: {otherwise}" if otherwise else says


def _listed(names: Sequence[str], most: int = 3) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _minor(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split()[0].split(".")[:2])


def backport_patches() -> list[Patch]:
    """The Patches of every backport.

    Those of torchspan's own are listed in an index, so that activation need not import their files: each is imported when
    something that it changes or provides is asked for. ``tools/make_backport_index.py`` makes the index.
    """
    index = json.loads(INDEX.read_text())
    patches: list[Patch] = []
    for name in backport_names():
        entry = index.get(name)
        patches += get_backport(name).patches() if entry is None else (_late(name, **listed) for listed in entry)
    return patches


def index_entry(backport: Backport) -> list[dict[str, Any]]:
    """The Patches of `backport` as the index lists them."""
    listed = []
    for patch in backport.patches():
        fields = {field.name: getattr(patch, field.name) for field in dataclasses.fields(patch)}
        plain = {name: value for name, value in fields.items() if name not in ("owner", "build", "topic", "follow")}
        listed.append({"kind": type(patch).__name__, **plain})
    return listed


def _late(owner: str, kind: str, **fields: Any) -> Patch:
    def build(*old: Any) -> Any:
        place = fields["target"], fields.get("attribute")
        patches: Iterator[Any] = (patch for patch in get_backport(owner).patches() if type(patch).__name__ == kind)
        return next(patch for patch in patches if (patch.target, getattr(patch, "attribute", None)) == place).build(*old)

    patch: Patch = _KINDS[kind](owner=owner, build=build, **fields)
    return patch


_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (MissingModule, MissingName, Replacement, Redefinition)}


def all_backports() -> list[Backport]:
    """Every backport, in the order of their names."""
    return [get_backport(name) for name in backport_names()]


def backport_names() -> list[str]:
    """The names of torchspan's backports, of other packages' and of registered ones, sorted."""
    return sorted([*REGISTRY.names(), *_registered])


def get_backport(name: str) -> Backport:
    """The backport of that name; raises UnknownNameError."""
    if name in _registered:
        return _registered[name]
    if name not in REGISTRY.names():
        raise unknown_name("backport", name, backport_names(), "'torchspan doctor' lists them")
    backport: Backport = REGISTRY.get(name).BACKPORT
    return backport


def register(backport: Backport) -> Callable[[], None]:
    """Add a backport in this process; returns what forgets it. Raises InputError if its name is taken."""
    if backport.name in backport_names():
        raise InputError(f"there is a backport {backport.name!r} already; register this one by another name")
    _registered[backport.name] = backport

    def forget() -> None:
        _registered.pop(backport.name, None)

    return forget


_registered: dict[str, Backport] = {}
