"""A program's run, and what is to be seen of it after each step; and what differs between two such runs.

A World is one run of a program's text: with a module, generators of random numbers, a default type and global hooks of its
own, so that two worlds in one process do not notice each other.
"""

from __future__ import annotations

import copy
import itertools
import linecache
import pickle
import random
import re
import sys
import threading
import types
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from _random_programs import Program
from torch import nn
from torch.nn.modules import module as torch_module

from torchspan.core.numerics import difference

_numbers = itertools.count()  # of modules: dynamo keeps what it has found in one by its name
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_hooks_always_called", "_global_forward_hooks_with_kwargs")


# what programs use beside torch


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors of a nested value, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if is_dataclass(value):
        return tensors_in([getattr(value, field.name) for field in fields(value)])
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, (list, tuple)) else []


def total(out: Any) -> torch.Tensor:
    """One number of all that requires a gradient, in which each element has its own part."""
    differentiable = [tensor for tensor in tensors_in(out) if tensor.requires_grad]
    return sum((torch.zeros(()), *map(_weighted, differentiable)))  # type: ignore[return-value]


def _weighted(value: torch.Tensor) -> torch.Tensor:
    real = torch.view_as_real(value) if value.is_complex() else value
    return (real.double() * torch.arange(1, real.numel() + 1).view(real.shape)).sum()


def first_of(out: Any) -> torch.Tensor:
    """The first tensor."""
    return tensors_in(out)[0]


def in_threads(count: int, call: Callable[[], Any]) -> list[Any]:
    """What `call` gives in each of `count` threads that run at the same time; raises what the first one raised."""
    outputs: dict[int, Any] = {}
    errors: dict[int, Exception] = {}
    gate = threading.Barrier(count)

    def run(number: int) -> None:
        gate.wait()
        try:
            outputs[number] = call()
        except Exception as error:  # noqa: BLE001 - the program's own, raised again below
            errors[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[min(errors)]
    return [outputs[number] for number in range(count)]


def _names() -> dict[str, Any]:
    return {
        "torch": torch,
        "nn": nn,
        "F": nn.functional,
        "np": np,
        "random": random,
        "copy": copy,
        "pickle": pickle,
        "namedtuple": namedtuple,
        "dataclass": dataclass,
        "Any": Any,
        "checkpoint": torch.utils.checkpoint.checkpoint,
        "spectral_norm": nn.utils.parametrizations.spectral_norm,
        "weight_norm": nn.utils.parametrizations.weight_norm,
        "total": total,
        "first_of": first_of,
        "in_threads": in_threads,
    }


# a world


@dataclass
class Seen:
    """What there is to see after a step: the text of its exception, and values by name."""

    error: str
    values: dict[str, Any]


class World:
    """One run of a program, with modules, generators and settings of its own."""

    def __init__(self, program: Program, start: Callable[[Any], Any]) -> None:
        self.program = program
        self.module = types.ModuleType(f"program_{next(_numbers)}")
        vars(self.module).update(_names(), start=start)
        sys.modules[self.module.__name__] = self.module
        self._state = _read_state()
        with self._inside():
            self._execute("setup", program.setup)

    def close(self) -> None:
        """Let everything go."""
        sys.modules.pop(self.module.__name__, None)
        names = [name for name in vars(self.module) if not name.startswith("__")]
        for name in names:  # the others are dynamo's, which removes them
            delattr(self.module, name)

    def step(self, number: int) -> Seen:
        """Run one step; what is there to be seen then."""
        names = vars(self.module)
        names.update(out=None, given=[])
        error = ""
        with self._inside():
            try:
                self._execute(f"step {number}", self.program.steps[number])
            except Exception as cause:  # noqa: BLE001 - the program's own: it is compared
                error = re.sub(r"0x[0-9a-f]+|program_\d+", "…", f"{type(cause).__name__}: {cause}")
            with torch.no_grad():
                return Seen(error, self._values() | {"random state": _random_values()})

    def _execute(self, place: str, text: str) -> None:
        file = f"<{self.module.__name__}, {place}>"
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        exec(compile(text, file, "exec"), vars(self.module))

    @contextmanager
    def _inside(self) -> Iterator[None]:
        outside = _read_state()
        _write_state(self._state)
        try:
            yield
        finally:
            self._state = _read_state()
            _write_state(outside)

    def _values(self) -> dict[str, Any]:
        names = vars(self.module)
        model = names.get("model")
        values = {name: names[name] for name in ("out", "given", "events", "noted", "state", "CALLS") if name in names}
        values["gradients of given"] = [tensor.grad for tensor in tensors_in(names["given"]) if tensor.is_leaf]
        if isinstance(model, nn.Module):
            values["parameters"] = dict(model.named_parameters())
            values["gradients"] = {name: parameter.grad for name, parameter in model.named_parameters()}
            values["buffers"] = dict(model.named_buffers())
            values["state_dict"] = list(model.state_dict())
            values["attributes"] = {name: _attributes(part) for name, part in model.named_modules()}
        values["shared memory"] = _aliases(names["out"], names["given"], model)
        return values


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in sorted(vars(module).items()) if not name.startswith("_")}


def _aliases(out: Any, given: Any, model: Any) -> list[str]:
    """Which tensors that came out lie in the memory of others, or are others."""
    own = list(model.state_dict(keep_vars=True).values()) if isinstance(model, nn.Module) else []
    groups = {"out": tensors_in(out), "given": tensors_in(given), "own": own}
    named = [(f"{name}[{i}]", value) for name, group in groups.items() for i, value in enumerate(group)]
    pairs = [(first, other) for i, first in enumerate(named[: len(groups["out"])]) for other in named[i + 1 :]]
    return [f"{a} {_relation(x, y)} {b}" for (a, x), (b, y) in pairs if _relation(x, y)]


def _relation(first: torch.Tensor, other: torch.Tensor) -> str:
    if first is other:
        return "is"
    if torch.strided not in (first.layout, other.layout) or first.is_nested or other.is_nested or first.layout != other.layout:
        return ""
    return "shares with" if first.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() != 0 else ""


def _random_values() -> list[Any]:
    return [torch.get_rng_state(), repr(random.getstate()), repr(np.random.get_state()[1:])]


def _read_state() -> tuple[Any, ...]:
    hooks = [dict(getattr(torch_module, name)) for name in _GLOBAL_HOOKS]
    return torch.get_rng_state(), random.getstate(), np.random.get_state(), torch.get_default_dtype(), hooks


def _write_state(state: tuple[Any, ...]) -> None:
    numbers, python, numpy, dtype, hooks = state
    torch.set_rng_state(numbers)
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_default_dtype(dtype)
    for name, own in zip(_GLOBAL_HOOKS, hooks, strict=True):
        getattr(torch_module, name).clear()
        getattr(torch_module, name).update(own)


# comparison


@dataclass
class Comparison:
    """How two worlds are compared: numbers within the tolerance of `dtypes`, all else exactly; and whether bits were equal.

    Hooks of gradients need not be `is_ordered`.
    """

    is_ordered: bool
    dtypes: tuple[torch.dtype, ...] = ()
    is_bitwise: bool = True

    def of(self, actual: Seen, expected: Seen) -> str:
        """What differs; "" if nothing does."""
        if actual.error != expected.error:
            return f"raises {actual.error or 'nothing'!r} instead of {expected.error or 'nothing'!r}"
        for name, value in expected.values.items():
            gap = self.gap(name, self._in_order(name, actual.values.get(name)), self._in_order(name, value))
            if gap:
                return gap
        return ""

    def _in_order(self, name: str, value: Any) -> Any:
        """Gradients that come from one compiled backward all at once are accumulated in an order of autograd's own."""
        return sorted(map(repr, value)) if name == "events" and not self.is_ordered else value

    def gap(self, name: str, actual: Any, expected: Any) -> str:
        """What differs between two nested values."""
        if type(actual).__name__ != type(expected).__name__:
            return f"{name}: {type(actual).__name__} instead of {type(expected).__name__}"
        if isinstance(expected, torch.Tensor):
            return self._gap_of_tensors(name, actual, expected)
        mine, theirs = _parts(actual), _parts(expected)
        if theirs is None or mine is None:
            return "" if _plain(actual) == _plain(expected) else f"{name}: {_plain(actual)} instead of {_plain(expected)}"
        if list(mine) != list(theirs):
            return f"{name}: parts {list(mine)} instead of {list(theirs)}"
        return next((gap for key in theirs if (gap := self.gap(f"{name}[{key!r}]", mine[key], theirs[key]))), "")

    def _gap_of_tensors(self, name: str, actual: torch.Tensor, expected: torch.Tensor) -> str:
        for what, read in _LAYOUT.items():
            if read(actual) != read(expected):
                return f"{name}: {what} {read(actual)} instead of {read(expected)}"
        if expected.is_nested:
            return self.gap(name, list(actual.unbind()), list(expected.unbind()))
        if _is_bitwise(actual, expected):
            return ""
        self.is_bitwise = False
        near = difference(actual, expected, *self.dtypes, name=name)
        return f"{near}: {_short(actual)} instead of {_short(expected)}" if near else ""


_LAYOUT: Mapping[str, Callable[[torch.Tensor], Any]] = {
    "dtype": lambda tensor: tensor.dtype,
    "layout": lambda tensor: tensor.layout,
    "shape": lambda tensor: None if tensor.is_nested else tuple(tensor.shape),
    "strides": lambda tensor: _strides(tensor),
    "requires_grad": lambda tensor: tensor.requires_grad,
    "is_leaf": lambda tensor: tensor.is_leaf,
    "is_inference": lambda tensor: tensor.is_inference(),
}


def _strides(tensor: torch.Tensor) -> Any:
    """Those of the dimensions that have more than one element."""
    if tensor.is_nested or tensor.layout is not torch.strided or not tensor.numel():
        return None
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _is_bitwise(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    first, other = (
        value.detach().to_dense() if value.layout is not torch.strided else value.detach() for value in (actual, expected)
    )
    if torch.equal(first, other):
        return True
    return torch.equal(first.isnan(), other.isnan()) and torch.equal(first.nan_to_num(0.125), other.nan_to_num(0.125))


def _short(tensor: torch.Tensor) -> str:
    return str(tensor.detach().flatten()[:4].tolist())


def _parts(value: Any) -> dict[Any, Any] | None:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return None


def _plain(value: Any) -> str:
    is_value = isinstance(value, (bool, int, float, complex, str, bytes, type(None), torch.dtype))
    return repr(value) if is_value else type(value).__name__
