"""Patches: reversible changes to a module's names or to an import, applied when their target is first there.

Seven kinds, all of them data::

    MissingModule    a module that this torch lacks; built when it is imported
    MissingName      a name that a module lacks; built when it is first looked up
    Replacement      a name that is there and must behave otherwise; put in place when its module is imported
    Redefinition     the same for a Python function that stays the object it was
    AbsentModule     a module that is not installed, and stays so: who imports it is told of
    Variable         an environment variable, which child processes are given too
    Effect           what is begun and ended as a whole, such as a mode of torch

`Patches` applies a list of them and undoes it exactly: every object that was there is there again.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torchspan.core.report import Report, user_site
from torchspan.environment.imports import AbsentModuleWatcher, MissingModuleFinder, when_imported
from torchspan.environment.rebind import rebind

_ABSENT = object()


@dataclass(frozen=True)
class MissingModule:
    """The module `target`, which this torch lacks; `build` gives its names."""

    owner: str
    target: str
    build: Callable[[], Mapping[str, object]]
    reason: str
    topic: str = "backport"


@dataclass(frozen=True)
class MissingName:
    """`attribute` of the module `target`, which lacks it; `build` gives the object."""

    owner: str
    target: str
    attribute: str
    build: Callable[[], object]
    reason: str
    topic: str = "backport"


@dataclass(frozen=True)
class Replacement:
    """`attribute` (dotted for a class's member) of the module `target`; `build` makes the new object from the old one.

    `build` may return the object it was given: then nothing is changed. A missing attribute is passed as None if `create`,
    and left alone otherwise. With `follow`, names that the program bound to the old object before are changed too.
    """

    owner: str
    target: str
    attribute: str
    build: Callable[[Any], object]
    create: bool = False
    follow: bool = False


@dataclass(frozen=True)
class Redefinition:
    """The Python function `attribute` of the module `target` behaves as what `build` makes of it, and stays the object it was.

    So names that were bound to it before follow, and tables that know it by identity still do. `build` is given a copy that
    behaves as before, and may return it: then nothing is changed. Of a decorated function, what is inside the decorators is
    redefined. What is no function or generator of Python (a builtin, a closure, an async function) is replaced; a missing one
    is left alone.
    """

    owner: str
    target: str
    attribute: str
    build: Callable[[Any], Callable[..., Any]]


@dataclass(frozen=True)
class AbsentModule:
    """The module `target` may not be installed; `on_import` is called when it is imported then, which fails as it would."""

    owner: str
    target: str
    on_import: Callable[[], None]


@dataclass(frozen=True)
class Variable:
    """The environment variable `target` has the value that `build` makes of the one that it had, or of None."""

    owner: str
    target: str
    build: Callable[[str | None], str]


@dataclass(frozen=True)
class Effect:
    """What is no name: `begin` puts it in force, in the thread that applies it, and returns what ends it."""

    owner: str
    target: str
    begin: Callable[[], Callable[[], None]]


Patch = MissingModule | MissingName | Replacement | Redefinition | AbsentModule | Variable | Effect


class Patches:
    """Applies patches, lazily, and undoes them; each use of what was missing is a Decision in `report`."""

    def __init__(self, patches: Iterable[Patch], report: Report) -> None:
        self._patches = tuple(patches)
        self._report = report
        self._undo: list[Callable[[], None]] = []
        self._lock = threading.RLock()
        self._followed: dict[str, list[tuple[object, object]]] = {}

    def apply(self) -> None:
        """Put every patch in force: now where its module is imported, later where it is not."""
        missing: dict[str, MissingModule] = {}
        absent: dict[str, AbsentModule] = {}
        names: dict[str, list[MissingName]] = {}
        replacements: dict[str, list[Replacement | Redefinition]] = {}
        for patch in self._patches:
            if isinstance(patch, MissingModule):
                missing[patch.target] = patch
            elif isinstance(patch, AbsentModule):
                absent[patch.target] = patch
            elif isinstance(patch, Variable):
                self._set_variable(patch)
            elif isinstance(patch, Effect):
                self._undo.append(patch.begin())
            elif isinstance(patch, MissingName):
                names.setdefault(patch.target, []).append(patch)
            else:
                replacements.setdefault(patch.target, []).append(patch)
        with self._lock:
            self._offer_modules(missing)
            self._watch_absent(absent)
            for target, patches in names.items():
                self._on_import(target, partial(self._offer_names, patches))
            for target, changes in replacements.items():
                self._on_import(target, partial(self._replace_all, changes))
            self._follow_names()

    def undo(self) -> None:
        """Take every patch back, last first."""
        with self._lock:
            while self._undo:
                self._undo.pop()()

    def _on_import(self, target: str, callback: Callable[[ModuleType], None]) -> None:
        self._undo.append(when_imported(target, callback))

    def _used(self, patch: MissingModule | MissingName, subject: str) -> None:
        self._report.decide(patch.topic, subject, f"torchspan's {patch.owner}", patch.reason, user_site())

    # missing modules

    def _offer_modules(self, missing: dict[str, MissingModule]) -> None:
        if not missing:
            return
        fill: dict[str, Callable[[ModuleType], None]] = {}
        for name in missing:
            fill |= dict.fromkeys(_parents(name), self._make_package)
        fill |= {name: partial(self._fill, patch) for name, patch in missing.items()}
        finder = MissingModuleFinder(fill)
        sys.meta_path.append(finder)
        self._undo.append(lambda: sys.meta_path.remove(finder))

    def _fill(self, patch: MissingModule, module: ModuleType) -> None:
        module.__doc__ = f"Provided by torchspan ({patch.owner}): {patch.reason}."
        for name, value in patch.build().items():
            setattr(module, name, value)
        self._used(patch, patch.target)
        self._undo.append(lambda: _forget_module(module))

    def _watch_absent(self, absent: dict[str, AbsentModule]) -> None:
        if absent:
            finder = AbsentModuleWatcher({name: patch.on_import for name, patch in absent.items()})
            sys.meta_path.append(finder)
            self._undo.append(lambda: sys.meta_path.remove(finder))

    def _set_variable(self, patch: Variable) -> None:
        before = os.environ.get(patch.target)
        os.environ[patch.target] = new = patch.build(before)

        def restore() -> None:
            if os.environ.get(patch.target) != new:
                return  # the program has set it since
            if before is None:
                del os.environ[patch.target]
            else:
                os.environ[patch.target] = before

        self._undo.append(restore)

    def _make_package(self, module: ModuleType) -> None:
        """A package that this torch lacks too: there is nothing in it but the modules that are offered."""
        module.__doc__ = "Provided by torchspan, for the modules in it."
        self._undo.append(lambda: _forget_module(module))

    # missing names: a module __getattr__, so that nothing is built before it is asked for

    def _offer_names(self, patches: list[MissingName], module: ModuleType) -> None:
        # an option is not read to see whether it is there: that warns of one that is deprecated
        is_there = lambda name: _is_option(module, name) or hasattr(module, name)  # noqa: E731
        lacking = {patch.attribute: patch for patch in patches if not is_there(patch.attribute)}
        if not lacking:
            return
        by_class = getattr(type(module), "__getattr__", None)  # of torch's configuration modules
        before = vars(module).get("__getattr__", _ABSENT if by_class is None else partial(by_class, module))

        def __getattr__(name: str) -> object:
            patch = lacking.get(name)
            if patch is None:
                if before is not _ABSENT:
                    return before(name)
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            return self._build_name(module, patch)

        vars(__getattr__)["offers"] = lacking
        self._set(module, "__getattr__", __getattr__)

    def _build_name(self, module: ModuleType, patch: MissingName) -> object:
        with self._lock:
            if patch.attribute not in vars(module):
                self._set(module, patch.attribute, patch.build())
                self._used(patch, f"{patch.target}.{patch.attribute}")
        return vars(module)[patch.attribute]

    # replacements

    def _replace_all(self, changes: list[Replacement | Redefinition], module: ModuleType) -> None:
        with self._lock:
            for patch in changes:
                *path, last = patch.attribute.split(".")
                holder: Any = module
                for part in path:
                    holder = None if holder is None or _is_offered(holder, part) else getattr(holder, part, None)
                if holder is not None:
                    self._replace(holder, last, patch)

    def _replace(self, holder: Any, name: str, patch: Replacement | Redefinition) -> None:
        attribute = vars(holder).get(name, _ABSENT)
        if _is_offered(holder, name):
            return
        current = attribute if isinstance(attribute, (staticmethod, classmethod, property)) else getattr(holder, name, None)
        if isinstance(patch, Redefinition) and callable(current):
            function = inspect.unwrap(current)
            if type(function) is FunctionType and not function.__closure__ and _kind(function.__code__) in _FORWARD:
                self._undo.append(_redefine(function, patch.build))
                return
        if current is None and not (isinstance(patch, Replacement) and patch.create):
            return
        new = patch.build(current)
        if new is not current:
            self._set(holder, name, new)
            if isinstance(patch, Replacement) and patch.follow:
                self._followed.setdefault(patch.target.partition(".")[0], []).append((current, new))

    def _follow_names(self) -> None:
        """Rebind what was bound before; while a package is still being imported, nobody can have."""
        for package, pairs in self._followed.items():
            if not getattr(getattr(sys.modules.get(package), "__spec__", None), "_initializing", False):
                self._undo += rebind(pairs, package)
        self._followed.clear()

    def _set(self, holder: Any, name: str, value: object) -> None:
        before = holder.__class__ if name == "__class__" else vars(holder).get(name, _ABSENT)
        # in place: torch's configuration modules allow only options to be set
        if (
            isinstance(holder, ModuleType)
            and name != "__class__"
            and type(holder).__setattr__ is not ModuleType.__setattr__
            and not _is_option(holder, name)
        ):
            vars(holder)[name] = value
            self._undo.append(lambda: vars(holder).pop(name) if before is _ABSENT else vars(holder).__setitem__(name, before))
            return
        setattr(holder, name, value)

        def restore() -> None:
            if before is _ABSENT:
                delattr(holder, name)
            else:
                setattr(holder, name, before)

        self._undo.append(restore)


def _is_offered(holder: Any, name: str) -> bool:
    """Whether `name` is one of ours, built when it is asked for: torch has nothing here to be replaced."""
    return name in getattr(vars(holder).get("__getattr__"), "offers", ())


def _forward(*args: Any, __torchspan: Any = None, **kwargs: Any) -> Any:
    return __torchspan(*args, **kwargs)


def _forward_generator(*args: Any, __torchspan: Any = None, **kwargs: Any) -> Any:
    return (yield from __torchspan(*args, **kwargs))


def _kind(code: CodeType) -> int:
    """What a call of this code makes, as flags: 0 for a result; a generator, a coroutine or an async generator otherwise."""
    return code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR)


# By the kind of the function that is redefined: from Python 3.13 on, a function's new code must be of the kind of its old one.
_FORWARD = {_kind(code): code for code in (_forward.__code__, _forward_generator.__code__)}


def _redefine(function: FunctionType, build: Callable[[Any], Callable[..., Any]]) -> Callable[[], None]:
    """Give `function` the body that calls what `build` makes of a copy of it; returns what gives it its own back."""
    code, defaults, named, names = function.__code__, function.__defaults__, function.__kwdefaults__, dict(vars(function))
    copy = FunctionType(code, function.__globals__, function.__name__, defaults)
    copy.__kwdefaults__ = dict(named or {})
    signature = inspect.signature(function)
    new = build(copy)
    if new is copy:
        return lambda: None
    function.__kwdefaults__ = {**(named or {}), "__torchspan": new}  # before the code that needs it: other threads may call
    function.__code__ = _FORWARD[_kind(code)].replace(co_name=code.co_name)
    function.__defaults__ = None
    vars(function)["__signature__"] = signature

    def restore() -> None:
        function.__defaults__ = defaults
        function.__code__ = code
        function.__kwdefaults__ = named
        vars(function).clear()
        vars(function).update(names)

    return restore


def _is_option(module: Any, name: str) -> bool:
    """Whether a configuration module has an option of this name, which is set as any user sets it."""
    return name in vars(module).get("_config", ())


def _parents(name: str) -> list[str]:
    """The packages that the module `name` is in, outermost first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _forget_module(module: ModuleType) -> None:
    parent_name, _, last = module.__name__.rpartition(".")
    if sys.modules.get(module.__name__) is module:
        del sys.modules[module.__name__]
    parent = sys.modules.get(parent_name)
    if parent is not None and vars(parent).get(last) is module:
        delattr(parent, last)
