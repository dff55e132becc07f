"""Mixed precision: ``autocast``, ``GradScaler`` and the decorators of custom autograd functions."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial, wraps
from typing import Any

import torch

from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function, named_like
from torchspan.environment.patch import Patch, Redefinition, Replacement


def patches(redirection: Redirection) -> Iterable[Patch]:
    """The classes keep their identity; their device type is redirected."""
    yield Replacement("amp", "torch.amp.autocast_mode", "autocast.__init__", partial(_autocast, redirection))
    yield Replacement("amp", "torch.amp.grad_scaler", "GradScaler.__init__", partial(_scaler, redirection))
    for name in ("custom_fwd", "custom_bwd"):
        yield Redefinition("amp", "torch.amp.autocast_mode", name, partial(_decorator, redirection, name))
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        yield Replacement("amp", "torch", name, partial(_of_the_target, redirection), follow=True)
    for name in ("set_autocast_enabled", "set_autocast_dtype"):
        yield Replacement("amp", "torch", name, partial(_setting_the_target, redirection), follow=True)
    if "cuda" in redirection.kinds:
        yield Replacement("amp", "torch", "set_autocast_gpu_dtype", partial(_setting_gpu_dtype, redirection), follow=True)
        yield Replacement("amp", "torch.cuda.amp.autocast_mode", "autocast.__init__", partial(_cuda_autocast, redirection))
        yield Replacement("amp", "torch", "get_autocast_gpu_dtype", partial(_gpu_dtype, redirection), follow=True)


def _autocast(redirection: Redirection, old: Any) -> Function:
    @wraps(old)
    def init(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        if device_type in redirection.kinds:
            redirection.note("torch.autocast", device_type)
            device_type = redirection.target
        old(self, device_type, *args, **kwargs)

    return init


def _cuda_autocast(redirection: Redirection, old: Any) -> Function:
    """``torch.cuda.amp.autocast``: its default of float16 is CUDA's; where none is given, the target's own is taken."""

    def init(self: Any, enabled: bool = True, dtype: torch.dtype | None = None, cache_enabled: bool = True) -> None:
        if dtype is None:
            dtype = torch.get_autocast_dtype(redirection.target)
            if dtype is not torch.float16:
                why = f"the default of autocast on {redirection.target}; CUDA's is float16"
                redirection.note("torch.cuda.amp.autocast(dtype)", None, why, str(dtype))
        old(self, enabled, dtype, cache_enabled)

    init.__doc__ = old.__doc__
    return init


def _of_the_target(redirection: Redirection, old: Any) -> Function:
    """A question about autocast on a redirected device is answered for the target; without a device it is about CUDA."""
    kinds, target = redirection.kinds, redirection.target

    def function(device_type: str = "cuda") -> Any:
        return old(target if device_type in kinds else device_type)

    redirection.originals[id(function)] = old
    return named_like(function, old, "torch")


def _setting_the_target(redirection: Redirection, old: Any) -> Function:
    """The same for functions that set it: ``set_autocast_enabled(True)`` is about CUDA."""
    kinds, target = redirection.kinds, redirection.target

    def function(device_type: Any, *value: Any) -> None:
        if not value:
            device_type, value = "cuda", (device_type,)
        old(target if device_type in kinds else device_type, *value)

    redirection.originals[id(function)] = old
    return named_like(function, old, "torch")


def _setting_gpu_dtype(redirection: Redirection, old: Any) -> Function:
    def set_autocast_gpu_dtype(dtype: torch.dtype) -> None:
        torch.set_autocast_dtype(redirection.target, dtype)

    redirection.originals[id(set_autocast_gpu_dtype)] = old
    return named_like(set_autocast_gpu_dtype, old, "torch")


def _gpu_dtype(redirection: Redirection, old: Any) -> Function:
    def get_autocast_gpu_dtype() -> torch.dtype:
        return torch.get_autocast_dtype(redirection.target)

    redirection.originals[id(get_autocast_gpu_dtype)] = old
    return named_like(get_autocast_gpu_dtype, old, "torch")


def _scaler(redirection: Redirection, old: Any) -> Function:
    @wraps(old)
    def init(self: Any, device: str = "cuda", *args: Any, **kwargs: Any) -> None:
        if device in redirection.kinds:
            redirection.note("torch.amp.GradScaler", device)
            device = redirection.target
        old(self, device, *args, **kwargs)

    return init


def _decorator(redirection: Redirection, name: str, old: Function) -> Function:
    def decorator(function: Any = None, *, device_type: str, **kwargs: Any) -> Any:
        if device_type in redirection.kinds:
            redirection.note(f"torch.amp.{name}", device_type)
            device_type = redirection.target
        return old(function, device_type=device_type, **kwargs)

    def by_name(*args: Any, **kwargs: Any) -> Any:
        if name[-3:] in kwargs:
            args = (kwargs.pop(name[-3:]),)
        return decorator(*args, **kwargs)

    return by_name
