"""Undoes what a program changes outside of its own modules and arguments, after a run that must leave no trace.

A forward may append to a list that it closes over, count in a global, or set an attribute of an object that it knows. What the
code of the program names is copied before such a run and restored after it. What hooks do cannot be undone:
:func:`effects_of_hooks` finds them, and a program that has some is not run for a check.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

_DEPTH = 3  # of functions that name functions, and of objects in objects
_MAX_ITEMS = 100_000  # of a container: a longer one is data, not what a forward notes
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ON_ALL_MODULES: list[dict[int, Any]] = [
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
]
_CONTAINERS = (list, dict, set, deque, bytearray)
_LEFT_ALONE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, torch.Tensor, nn.Module)


def has_global_hooks() -> bool:
    """Whether there are hooks on all modules: code that was compiled before they came would not call them.

    >>> has_global_hooks()
    False
    """
    return any(_ON_ALL_MODULES)


def effects_of_hooks(modules: Iterable[nn.Module]) -> str | None:
    """Why an extra run of these modules would be noticed: a hook of the program's own; None if there is none.

    >>> model = nn.Linear(1, 1)
    >>> handle = model.register_forward_hook(lambda *_: print("called"))
    >>> effects_of_hooks([model])
    'Linear has a hook (<lambda>), which would be called too often'
    """
    for hooks in _ON_ALL_MODULES:
        for hook in hooks.values():
            return f"there is a hook on all modules ({_name(hook)}), which would be called too often"
    for module in (inner for root in modules for inner in root.modules()):
        for hook in (hook for name in _HOOKS for hook in getattr(module, name, {}).values()):
            if not _is_torchs(hook):
                return f"{type(module).__name__} has a hook ({_name(hook)}), which would be called too often"
    return None


def _name(hook: Any) -> str:
    return getattr(hook, "__name__", type(hook).__name__)


def _is_torchs(hook: Any) -> bool:
    """Whether it is a hook with which torch itself computes a weight, as its spectral norm does."""
    owner = getattr(hook, "__module__", None) or type(hook).__module__
    return str(owner).startswith("torch.nn.utils.")


@contextmanager
def undone(functions: Iterable[Callable[..., Any]]) -> Iterator[None]:
    """Restore what the code of `functions` names when the block ends.

    >>> calls = []
    >>> with undone([lambda: calls.append(1)]):
    ...     calls.append(2)
    >>> calls
    []
    """
    copies = _Kept()
    for function in functions:
        copies.function(function, _DEPTH)
    try:
        yield
    finally:
        copies.put_back()


class _Kept:
    """Shallow copies of what may change, and how to restore each."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._alive: list[Any] = []  # what is known by its address
        self._backs: list[Callable[[], None]] = []

    def put_back(self) -> None:
        """Restore everything that has changed."""
        for back in self._backs:
            back()

    def function(self, function: Any, depth: int) -> None:
        """Copy what the code of a function names."""
        function = getattr(function, "__func__", function)
        if not isinstance(function, types.FunctionType) or not self._is_new(function):
            return
        for cell in function.__closure__ or ():
            self._cell(cell, depth)
        for name in _names(function.__code__):
            if name in function.__globals__:
                self._named(function.__globals__, name, depth)

    def _cell(self, cell: types.CellType, depth: int) -> None:
        try:
            value = cell.cell_contents
        except ValueError:  # not set yet
            return

        def back() -> None:
            cell.cell_contents = value

        self._backs.append(back)
        self._value(value, depth)

    def _named(self, names: dict[str, Any], name: str, depth: int) -> None:
        value = names[name]

        def back() -> None:
            if names.get(name) is not value:
                names[name] = value

        self._backs.append(back)
        self._value(value, depth)

    def _value(self, value: Any, depth: int) -> None:
        if isinstance(value, types.FunctionType) and depth and not str(value.__module__).startswith("torch"):
            self.function(value, depth - 1)
        elif isinstance(value, nn.Module):
            self._module(value, depth)
        elif type(value) in _CONTAINERS:
            self._container(value, depth)
        elif depth and not isinstance(value, _LEFT_ALONE) and type(getattr(value, "__dict__", None)) is dict:
            self._container(value.__dict__, depth - 1)

    def _module(self, module: nn.Module, depth: int) -> None:
        """Copy the state of a module that the code names."""
        for inner in module.modules():
            if self._is_new(inner):
                self._container(inner.__dict__, min(depth, 1))
                self.function(type(inner).forward, depth - 1)
        for buffer in module.buffers():
            self._tensor(buffer)

    def _tensor(self, tensor: torch.Tensor) -> None:
        version, copied = tensor._version, tensor.detach().clone()

        def back() -> None:
            if tensor._version != version or not torch.equal(tensor, copied):
                with torch.no_grad():
                    tensor.copy_(copied)

        self._backs.append(back)

    def _container(self, value: Any, depth: int) -> None:
        if len(value) > _MAX_ITEMS or not self._is_new(value):
            return
        copied = value.copy()

        def back() -> None:
            if not _is_same(value, copied):
                value.clear()
                (value.update if isinstance(value, (dict, set)) else value.extend)(copied)

        self._backs.append(back)
        for item in (value.values() if isinstance(value, dict) else ()) if depth else ():
            if type(item) in _CONTAINERS:
                self._container(item, depth - 1)

    def _is_new(self, value: Any) -> bool:
        if id(value) in self._seen:
            return False
        self._seen.add(id(value))
        self._alive.append(value)
        return True


def _is_same(first: Any, second: Any) -> bool:
    """Whether two containers hold the same objects, compared by identity: an ``__eq__`` may do anything."""
    if len(first) != len(second):
        return False
    if isinstance(first, dict):
        return all(a is b and first[a] is second[b] for a, b in zip(first, second, strict=True))
    return all(a is b for a, b in zip(first, second, strict=True))


def _names(code: types.CodeType) -> Iterator[str]:
    """The global names of a function's code, and of the functions in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
