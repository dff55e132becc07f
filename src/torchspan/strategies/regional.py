"""The parts of a model that its author marked or named are regions; equal ones share one compile, the rest runs eagerly."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from torchspan.core.errors import InputError
from torchspan.regions.part import Part
from torchspan.strategies._base import Cut, Request
from torchspan.strategies._blocks import distinct, is_container, kind_name, kinds_of
from torchspan.strategies._marks import is_marked

SUMMARY = "the modules marked by torchspan.region or named by regions=, each kind as a region"


def cut(program: Callable[..., Any], request: Request) -> Cut:
    """One part for each kind of named modules, or, where none are named, of marked ones; raises InputError for a wrong name."""
    if not isinstance(program, nn.Module):
        return Cut((), "a function has no modules to mark")
    chosen = named(program, request.regions) if request.regions else marked(program)
    how = "named" if request.regions else "marked"
    if not chosen:
        return Cut((), "no module is marked with torchspan.region(module), and none is named with regions=['encoder.layers.*']")
    names = {id(module): name for name, module in program.named_modules()}
    parts = tuple(Part(kind_name(kind, names), tuple(kind), is_block=True) for kind in kinds_of(chosen))
    return Cut(parts, f"{how} regions: {', '.join(part.name for part in parts)}")


def marked(model: nn.Module) -> list[nn.Module]:
    """The outermost marked modules inside `model`."""
    return _outermost(model, [module for module in model.modules() if module is not model and is_marked(module)])


def named(model: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """The outermost modules inside `model` whose names match one of `patterns` (``*`` stands for anything).

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Tanh()))
    >>> named(model, ["1", "1.*"])[0] is model[1], len(named(model, ["1.*"]))
    (True, 2)
    >>> named(model, ["2"])
    Traceback (most recent call last):
    torchspan.core.errors.InputError: regions has '2', but Sequential has no module of that name; it has 0, 1, 1.0, 1.1
    """
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    chosen: list[nn.Module] = []
    for pattern in patterns:
        matches = [module for name, module in modules.items() if fnmatchcase(name, pattern)]
        if not matches:
            raise InputError(f"regions has {pattern!r}, but {_without(model, pattern, list(modules))}")
        chosen += matches
    return _outermost(model, chosen)


def _without(model: nn.Module, pattern: str, names: list[str]) -> str:
    close = difflib.get_close_matches(pattern, names, n=1)
    listed = ", ".join([*names[:8], "…"] if len(names) > 8 else names) or "none"
    hint = f"did you mean {close[0]!r}?" if close else f"it has {listed}"
    return f"{type(model).__name__} has no module of that name; {hint}"


def _outermost(model: nn.Module, chosen: list[nn.Module]) -> list[nn.Module]:
    """`chosen` in the order of `model`, without what is inside another; a list of modules stands for those in it."""
    chosen_ids = {id(part) for module in chosen for part in _callable_parts(module)}
    return distinct(_first(model, chosen_ids))


def _callable_parts(module: nn.Module) -> Iterator[nn.Module]:
    if not is_container(module):
        yield module
        return
    for child in module.children():
        yield from _callable_parts(child)


def _first(module: nn.Module, chosen_ids: set[int]) -> Iterator[nn.Module]:
    for child in module.children():
        if id(child) in chosen_ids:
            yield child
        else:
            yield from _first(child, chosen_ids)
