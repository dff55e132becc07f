"""The signature of a call: what decides whether code that was compiled for one call may serve another."""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from torchspan.core.errors import InputError
from torchspan.regions.ambient import autocast_state

Sizes = tuple[tuple[int, ...], ...]  # of each tensor of a call, in the order in which they are found
Dims = tuple[frozenset[int], ...]  # of each tensor, which of its dimensions

_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_NOT_ENTERED = (*_VALUES, type, types.FunctionType, types.MethodType, types.ModuleType, torch.nn.Module)
_EXACT = frozenset(_VALUES) - {float, complex}
_DEPTH = 5  # of the objects in an object that are looked into for tensors
_NESTED = 100  # containers in containers that are followed: one that holds itself has no end


def signature(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """Shapes, strides, dtypes, devices and who wants gradients; grad mode, autocast, train or eval; and plain values.

    Raises whatever an argument raises that cannot be read: a tensor without strides, an object whose attributes raise.
    """
    found = _walk(target, args, kwargs, None)
    hash(found)
    return found


def family(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Hashable, Sizes]:
    """The signature without sizes (of strides, their order is left), and the sizes.

    >>> one, sizes = family(None, (torch.ones(2, 3),), {})
    >>> other, other_sizes = family(None, (torch.ones(4, 3),), {})
    >>> one == other, sizes, differing(sizes, other_sizes)
    (True, ((2, 3),), (frozenset({0}),))
    """
    tensors: list[torch.Tensor] = []
    found = _walk(target, args, kwargs, tensors)
    return found, tuple(tuple(tensor.shape) for tensor in tensors)


def tensors_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors of a call, in the order of :func:`family`'s sizes."""
    tensors: list[torch.Tensor] = []
    _walk(None, args, kwargs, tensors)
    return tensors


def differing(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]) -> Dims:
    """In which dimensions the sizes of two calls of one family differ."""
    return tuple(
        frozenset(dim for dim, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
        for one, other in zip(first, second, strict=True)
    )


def _walk(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: list[torch.Tensor] | None) -> Hashable:
    """What was found of a call; with `tensors` they are gathered there, and their sizes are left out."""
    found: list[Hashable] = [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast_state()]
    if isinstance(target, torch.nn.Module):
        found.append(target.training)
    for value in args:
        _add(value, found, tensors)
    for name in sorted(kwargs):
        found.append(name)
        _add(kwargs[name], found, tensors)
    return tuple(found)


def _add(value: Any, found: list[Hashable], tensors: list[torch.Tensor] | None, depth: int = _NESTED) -> None:
    if not depth:
        raise InputError(f"an argument holds more than {_NESTED} containers in one another, or itself")
    if isinstance(value, torch.Tensor):
        if tensors is None:
            layout: Hashable = (value.shape, value.stride() if value.layout is torch.strided else value.layout)
        else:
            tensors.append(value)
            layout = _order(value)
        found.append((layout, value.dtype, value.device, value.requires_grad, type(value)))
    elif isinstance(value, _VALUES):
        found.append((type(value), _plain(value)))
    elif isinstance(value, (tuple, list)):
        found.append((type(value), len(value)))
        for item in value:
            _add(item, found, tensors, depth - 1)
    elif isinstance(value, Mapping):
        found.append((type(value), *map(_plain, value)))
        for item in value.values():
            _add(item, found, tensors, depth - 1)
    elif isinstance(value, torch.nn.Module):
        found.append((type(value), id(value), value.training))
    else:
        found.append(f"{type(value).__module__}.{type(value).__qualname__}")
        for tensor in _held(value, _DEPTH, set()):
            _add(tensor, found, tensors)


def _plain(value: Any) -> Hashable:
    """A value that equals another one just where a program may not tell them apart, and never raises when it is compared.

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


def _held(value: Any, depth: int, seen: set[int]) -> Iterator[torch.Tensor]:
    """The tensors that an object holds, as a cache of keys and values does; not its plain values, which may count calls."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and not isinstance(value, _NOT_ENTERED) and id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, Mapping):
            inner: Iterable[Any] = value.values()
        else:
            inner = value if isinstance(value, (tuple, list)) else getattr(value, "__dict__", {}).values()
        for item in inner:
            yield from _held(item, depth - 1, seen)


def _order(tensor: torch.Tensor) -> Hashable:
    """The dimensions by falling stride, which a size does not change; of one that is not dense, the strides themselves."""
    if tensor.layout is not torch.strided:
        return tensor.layout, tensor.dim()
    if tensor.is_contiguous():
        return tensor.dim()
    order = tuple(sorted(range(tensor.dim()), key=lambda dim: -tensor.stride(dim)))
    return order if tensor.permute(order).is_contiguous() else (order, tensor.stride())
