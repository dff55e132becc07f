"""Names that a program bound before a patch: ``from torch import zeros``, a partial of it, an argument's default."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import FunctionType
from typing import Any

Undo = Callable[[], None]


def rebind(pairs: Iterable[tuple[object, object]], package: str) -> list[Undo]:
    """Bind what is bound to the first of a pair to the second, in all code but that of `package`; returns what undoes it.

    Looked through are the globals of modules and of executed code, functools.partial objects, and functions' defaults.

    >>> before, after = (lambda: "before"), (lambda: "after")
    >>> scope = {"__builtins__": None, "__name__": "mine", "name": before}
    >>> (undo,) = rebind([(before, after)], "torch")
    >>> scope["name"] is after, undo(), scope["name"] is before
    (True, None, True)
    """
    table = {id(old): (old, new) for old, new in pairs}
    undo: list[Undo] = []
    for holder in gc.get_objects():
        kind = type(holder)
        if kind is dict and "__builtins__" in holder and not _is_of(holder.get("__name__"), package):
            undo += _rebind_names(holder, table)
        elif kind is partial and id(holder.func) in table:
            undo += _rebind_partial(holder, table[id(holder.func)][1])
        elif kind is FunctionType and holder.__defaults__ is not None and not _is_of(holder.__module__, package):
            undo += _rebind_defaults(holder, table)
    return undo


def _is_of(name: object, package: str) -> bool:
    return isinstance(name, str) and (name == package or name.startswith((f"{package}.", "torchspan.")))


def _rebind_names(names: dict[str, Any], table: dict[int, tuple[object, object]]) -> Iterator[Undo]:
    for name, value in list(names.items()):
        pair = table.get(id(value))
        if pair is not None:
            names[name] = pair[1]
            yield partial(_restore_name, names, name, *pair)


def _restore_name(names: dict[str, Any], name: str, old: object, new: object) -> None:
    if names.get(name) is new:
        names[name] = old


def _rebind_partial(holder: partial[Any], new: object) -> Iterator[Undo]:
    old = holder.func
    holder.__setstate__((new, holder.args, holder.keywords, vars(holder) or None))  # type: ignore[attr-defined]
    yield lambda: holder.__setstate__((old, holder.args, holder.keywords, vars(holder) or None))  # type: ignore[attr-defined]


def _rebind_defaults(function: FunctionType, table: dict[int, tuple[object, object]]) -> Iterator[Undo]:
    defaults = function.__defaults__ or ()
    if any(id(value) in table for value in defaults):
        function.__defaults__ = tuple(table.get(id(value), (None, value))[1] for value in defaults)
        yield partial(setattr, function, "__defaults__", defaults)
