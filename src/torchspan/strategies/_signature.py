"""The signature of a call: what decides whether code that was compiled for one call may serve another."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch

from torchspan.strategies._ambient import autocast_state

_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


def signature(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """Shapes, strides, dtypes, devices and who wants gradients; grad mode, autocast, train or eval; and plain values."""
    found: list[Hashable] = [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast_state()]
    if isinstance(target, torch.nn.Module):
        found.append(target.training)
    for value in args:
        _add(value, found)
    for name in sorted(kwargs):
        found.append(name)
        _add(kwargs[name], found)
    return tuple(found)


def _add(value: Any, found: list[Hashable]) -> None:
    if isinstance(value, torch.Tensor):
        strides = value.stride() if value.layout is torch.strided else value.layout
        found.append((value.shape, strides, value.dtype, value.device, value.requires_grad, type(value)))
    elif isinstance(value, _VALUES):
        found.append((type(value), value))
    elif isinstance(value, (tuple, list)):
        found.append((type(value), len(value)))
        for item in value:
            _add(item, found)
    elif isinstance(value, Mapping):
        found.append((type(value), *value))
        for item in value.values():
            _add(item, found)
    elif isinstance(value, torch.nn.Module):
        found.append((type(value), id(value), value.training))
    else:
        found.append(f"{type(value).__module__}.{type(value).__qualname__}")
