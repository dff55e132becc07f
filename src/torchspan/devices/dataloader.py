"""Pinned memory: ``DataLoader(pin_memory=True)``, ``Tensor.pin_memory()``. The accelerator pins it; without one nothing is."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial, wraps
from typing import Any

import torch

from torchspan.core.topics import Standing
from torchspan.devices import _redirect
from torchspan.devices._memories import DEVICE, HOST, mark_storage, memory_of_storage
from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function
from torchspan.environment.patch import Patch, Replacement

WHAT = "memory is not pinned without an accelerator"


def patches(redirection: Redirection) -> Iterable[Patch]:
    """The loader's constructor, its iterators, and the methods of tensors and storages."""
    yield Replacement("dataloader", "torch.utils.data.dataloader", "DataLoader.__init__", partial(_loader, redirection))
    for name, build in {"__init__": _iterator, "__next__": _next}.items():
        iterator = f"_BaseDataLoaderIter.{name}"
        yield Replacement("dataloader", "torch.utils.data.dataloader", iterator, partial(build, redirection))
    for target, holder in (("torch", "Tensor"), ("torch.storage", "_StorageBase"), ("torch.storage", "TypedStorage")):
        yield Replacement("dataloader", target, f"{holder}.pin_memory", partial(_pin, redirection, holder), follow=True)
        yield Replacement("dataloader", target, f"{holder}.is_pinned", partial(_is_pinned, redirection), follow=True)


def _loader(redirection: Redirection, old: Any) -> Function:
    @wraps(old)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        old(self, *args, **kwargs)
        if self.pin_memory and not redirection.has_target_module:
            redirection.note("DataLoader(pin_memory=True)", None, WHAT, "copies", Standing.SIMULATED)

    return init


def _iterator(redirection: Redirection, old: Any) -> Function:
    """torch's iterator warns where it cannot pin, so it is not told to; its batches are pinned when they are given out."""

    @wraps(old)
    def init(self: Any, loader: Any, *args: Any, **kwargs: Any) -> None:
        pinning = loader.pin_memory, loader.pin_memory_device
        loader.pin_memory, loader.pin_memory_device = False, ""
        try:
            old(self, loader, *args, **kwargs)
        finally:
            loader.pin_memory, loader.pin_memory_device = pinning
        self._torchspan_pins = bool(pinning[0])

    return init


def _next(redirection: Redirection, old: Any) -> Function:
    @wraps(old)
    def following(self: Any) -> Any:
        batch = old(self)
        if not getattr(self, "_torchspan_pins", False) or _redirect.in_force is not redirection:
            return batch
        with redirection.quiet():
            return torch.utils.data._utils.pin_memory.pin_memory(batch)

    return following


def _storage(value: Any) -> Any:
    """The untyped storage of a tensor or of a storage."""
    return value.untyped_storage() if hasattr(value, "untyped_storage") else getattr(value, "_untyped_storage", value)


def _pin(redirection: Redirection, holder: str, old: Any) -> Function:
    def pin_memory(self: Any, device: Any = None) -> Any:
        if redirection.has_target_module:
            return _pinned_by_target(redirection, holder, self, old)
        redirection.note(f"{holder}.pin_memory()", None, WHAT, "a copy", Standing.SIMULATED)
        if hasattr(_storage(self), "_torchspan_pinned"):
            return self
        if redirection.masquerade and memory_of_storage(_storage(self)) is DEVICE:
            kind = self.type() if holder == "Tensor" else holder
            raise RuntimeError(f"cannot pin '{kind}' only dense CPU tensors can be pinned")
        copy = self.clone()
        _storage(copy)._torchspan_pinned = True
        mark_storage(_storage(copy), HOST)
        return copy

    redirection.originals[id(pin_memory)] = old
    pin_memory.__doc__ = old.__doc__
    return pin_memory


def _pinned_by_target(redirection: Redirection, holder: str, value: Any, old: Any) -> Any:
    """Pinned by the accelerator that stands in for CUDA; as it is, where that pins nothing."""
    redirection.note(f"{holder}.pin_memory()")
    try:
        return old(value)
    except (RuntimeError, NotImplementedError) as cause:
        redirection.leave_out(f"{holder}.pin_memory()", "not pinned", str(cause).splitlines()[0])
        return value


def _is_pinned(redirection: Redirection, old: Any) -> Function:
    def is_pinned(self: Any, device: Any = None) -> bool:
        return bool(old(self)) if redirection.has_target_module else hasattr(_storage(self), "_torchspan_pinned")

    redirection.originals[id(is_pinned)] = old
    is_pinned.__doc__ = old.__doc__
    return is_pinned
