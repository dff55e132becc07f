"""The signature of a call: what decides whether code that was compiled for one call may serve another."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from torchspan.core.errors import InputError
from torchspan.regions.ambient import autocast_state

Sizes = tuple[tuple[Any, ...], ...]  # of each tensor of a call, in the order in which they are found; last its plain values
Dims = tuple[frozenset[int], ...]  # of each tensor, which of its dimensions; last which of the plain values

_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_NOT_ENTERED = (*_VALUES, type, types.FunctionType, types.MethodType, types.ModuleType, torch.nn.Module)
_EXACT = frozenset(_VALUES) - {float, complex}
_OPEN = frozenset((bool, int, float, complex, str, bytes))  # that a family leaves out, of exactly these classes
_DEPTH = 5  # of the objects in an object that are looked into for tensors
_NESTED = 100  # containers in containers that are followed: one that holds itself has no end


def signature(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """Shapes, strides, dtypes, devices, ``requires_grad``; grad mode, autocast, train or eval; and plain values.

    If an argument cannot be read, its error is raised: a tensor without strides, an object whose attributes raise.
    """
    key = _walk(target, args, kwargs, None)
    hash(key)
    return key


def family(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Hashable, Sizes]:
    """The signature without sizes, numbers and text (of strides only their order stays), and what was taken out.

    >>> first, sizes = family(None, (torch.ones(2, 3), 0.5), {})
    >>> second, other_sizes = family(None, (torch.ones(4, 3), 0.7), {})
    >>> first == second, sizes, differing(sizes, other_sizes)
    (True, ((2, 3), (0.5,)), (frozenset({0}), frozenset({0})))
    """
    gathered = _Gathered()
    key = _walk(target, args, kwargs, gathered)
    return key, (*(tuple(tensor.shape) for tensor in gathered.tensors), tuple(gathered.values))


def tensors_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors of a call, in the order of :func:`family`'s sizes."""
    gathered = _Gathered()
    _walk(None, args, kwargs, gathered)
    return gathered.tensors


def differing(first: Sequence[Sequence[Any]], second: Sequence[Sequence[Any]]) -> Dims:
    """In which dimensions the sizes of two calls of one family differ, and in which plain values."""
    return tuple(
        frozenset(dim for dim, (a, b) in enumerate(zip(size, other_size, strict=True)) if not _is_equal(a, b))
        for size, other_size in zip(first, second, strict=True)
    )


def general(sizes: Sizes) -> Dims:
    """Every dimension that code for these sizes can be dynamic in: to torch, a size of 0 or 1 is a case of its own.

    >>> general(((2, 1), (0.5, 7, 1, True, "text", float("nan"))))
    (frozenset({0}), frozenset({0, 1}))
    """
    return tuple(frozenset(dim for dim, value in enumerate(size) if _is_general(value)) for size in sizes)


def numbers(sizes: Sizes) -> Dims:
    """Every dimension, and every plain value that may become a symbol: no strings and no booleans."""
    return tuple(frozenset(dim for dim, value in enumerate(size) if type(value) in (int, float)) for size in sizes)


def _is_general(value: Any) -> bool:
    if type(value) is float:
        return math.isfinite(value)
    return type(value) is int and value not in (-1, 0, 1)


def _is_equal(first: Any, second: Any) -> bool:
    return bool(first == second) and (type(first) not in (float, complex) or repr(first) == repr(second))


@dataclass(frozen=True)
class _Gathered:
    """What a family leaves out."""

    tensors: list[torch.Tensor] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)


def has_negative_zero(sizes: Sizes) -> bool:
    """Whether a plain value is -0.0, which torch's guards take for 0.0."""
    return any(type(value) is float and value == 0.0 and math.copysign(1.0, value) < 0 for value in sizes[-1])


def _walk(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], gathered: _Gathered | None) -> Hashable:
    """The parts of a signature; with `gathered`, sizes and plain values are left out, and tensors and values go there."""
    parts: list[Hashable] = [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast_state()]
    if isinstance(target, torch.nn.Module):
        parts.append(target.training)
    for value in args:
        _add(value, parts, gathered)
    for name in sorted(kwargs):
        parts.append(name)
        _add(kwargs[name], parts, gathered)
    return tuple(parts)


def _add(value: Any, parts: list[Hashable], gathered: _Gathered | None, depth: int = _NESTED) -> None:
    if not depth:
        raise InputError(f"an argument holds more than {_NESTED} containers in one another, or itself")
    if isinstance(value, torch.Tensor):
        if gathered is None:
            layout: Hashable = (value.shape, value.stride() if value.layout is torch.strided else value.layout)
        else:
            gathered.tensors.append(value)
            layout = _order(value)
        parts.append((layout, value.dtype, value.device, value.requires_grad, type(value)))
    elif gathered is not None and type(value) in _OPEN:
        gathered.values.append(value)
        parts.append((type(value),))
    elif isinstance(value, _VALUES):
        parts.append((type(value), _plain(value)))
    elif isinstance(value, (tuple, list)):
        parts.append((type(value), len(value)))
        for item in value:
            _add(item, parts, gathered, depth - 1)
    elif isinstance(value, Mapping):
        parts.append((type(value), *map(_plain, value)))
        for item in value.values():
            _add(item, parts, gathered, depth - 1)
    elif isinstance(value, torch.nn.Module):
        parts.append((type(value), id(value), value.training))
    else:
        parts.append(f"{type(value).__module__}.{type(value).__qualname__}")
        for tensor in _held(value, _DEPTH, set()):
            _add(tensor, parts, gathered)


def _plain(value: Any) -> Hashable:
    """A stand-in for `value`: two are equal only where no program can tell the values apart, and comparing never raises.

    >>> _plain(float("nan")) == _plain(float("nan")), _plain(0.0) == _plain(-0.0), _plain(2) == _plain(2)
    (True, False, True)
    """
    if type(value) in _EXACT:
        return value
    if isinstance(value, (float, complex)):
        return repr(complex(value)) if isinstance(value, complex) else float.hex(value)
    for base, read in _READ.items():
        if isinstance(value, base):
            return read(value)
    return id(value)


# of what is no more than a str, an int …, by a class of the program's own, which may compare as it likes
_READ: Mapping[type, Callable[[Any], Hashable]] = {
    str: str.__str__,
    int: int.__int__,
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
    tuple: lambda value: tuple(map(_plain, tuple.__iter__(value))),
}


def _held(value: Any, depth: int, visited: set[int]) -> Iterator[torch.Tensor]:
    """The tensors that an object holds, as a cache of keys and values does; not its plain values, which may count calls."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and not isinstance(value, _NOT_ENTERED) and id(value) not in visited:
        visited.add(id(value))
        if isinstance(value, Mapping):
            inner: Iterable[Any] = value.values()
        else:
            inner = value if isinstance(value, (tuple, list)) else getattr(value, "__dict__", {}).values()
        for item in inner:
            yield from _held(item, depth - 1, visited)


def _order(tensor: torch.Tensor) -> Hashable:
    """The dimensions by falling stride, which a size does not change; of one that is not dense, the strides themselves."""
    if tensor.layout is not torch.strided:
        return tensor.layout, tensor.dim()
    if tensor.is_contiguous():
        return tensor.dim()
    order = tuple(sorted(range(tensor.dim()), key=lambda dim: -tensor.stride(dim)))
    return order if tensor.permute(order).is_contiguous() else (order, tensor.stride())
