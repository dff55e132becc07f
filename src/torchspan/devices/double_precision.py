"""Double precision where the target has none (MPS, some XPUs): operators that are asked for it compute in single precision.

The rules for factories and for moves narrow what is made and what is moved, and report it in the same words.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from torchspan.devices._redirect import NARROW, Redirection
from torchspan.devices._wrap import Function, named_like
from torchspan.environment.patch import Patch, Redefinition, Replacement

_WITH_DTYPE = (
    "sum",
    "nansum",
    "mean",
    "nanmean",
    "prod",
    "cumsum",
    "cumprod",
    "softmax",
    "log_softmax",
    "norm",
)
_TO_DOUBLE = {"double": torch.float64, "cdouble": torch.complex128}


def patches(redirection: Redirection) -> Iterable[Patch]:
    """Operators that take a ``dtype``, ``Tensor.double``, and what is loaded from a file."""
    if not redirection.lacks_float64:
        return
    for name in _WITH_DTYPE:
        if not _is_python(getattr(torch, name)):
            yield Replacement("double_precision", "torch", name, partial(_narrowing, redirection, f"torch.{name}"), follow=True)
        if hasattr(torch.Tensor, name):
            narrowing = partial(_narrowing, redirection, f"Tensor.{name}")
            yield Replacement("double_precision", "torch", f"Tensor.{name}", narrowing, follow=True)
    for name, dtype in _TO_DOUBLE.items():
        converting = partial(_converting, redirection, f"Tensor.{name}", dtype)
        yield Replacement("double_precision", "torch", f"Tensor.{name}", converting, follow=True)
    yield Redefinition("double_precision", "torch._utils", "_rebuild_tensor", partial(_rebuilding, redirection))


def _is_python(function: Any) -> bool:
    """Whether torch's function is Python that calls a method, which is narrowed itself."""
    return hasattr(function, "__code__")


def _narrowing(redirection: Redirection, name: str, old: Function) -> Function:
    def function(*args: Any, **kwargs: Any) -> Any:
        arguments = (*args, kwargs.get("dtype"))
        is_asked = any(type(value) is torch.dtype and value in NARROW for value in arguments)
        if is_asked and redirection.is_on_target(args[0] if args else kwargs.get("input")):
            args = tuple(redirection.narrowed(name, value) if type(value) is torch.dtype else value for value in args)
            if "dtype" in kwargs:
                kwargs["dtype"] = redirection.narrowed(name, kwargs["dtype"])
        return old(*args, **kwargs)

    redirection.originals[id(function)] = old
    return named_like(function, old, "torch" if name.startswith("torch.") else "torch._tensor")


def _converting(redirection: Redirection, name: str, dtype: torch.dtype, old: Function) -> Function:
    def function(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not redirection.is_on_target(self):
            return old(self, *args, **kwargs)
        return self.to(redirection.narrowed(name, dtype))

    redirection.originals[id(function)] = old
    return named_like(function, old, "torch._tensor")


def _rebuilding(redirection: Redirection, old: Function) -> Function:
    """A tensor of a file whose storage was read to the device: its numbers are narrowed on the CPU."""

    def _rebuild_tensor(storage: Any, storage_offset: Any, size: Any, stride: Any) -> Any:
        is_wide = getattr(storage, "dtype", None) in NARROW and storage.device.type == redirection.target_kind
        if not is_wide:
            return old(storage, storage_offset, size, stride)
        tensor = old(storage.cpu(), storage_offset, size, stride)
        return tensor.to(storage.device, redirection.narrowed("torch.load", tensor.dtype))

    return _rebuild_tensor
