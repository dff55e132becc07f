"""Functions that make tensors: ``torch.zeros(3, device="cuda")``, ``zeros_like``, ``Tensor.new_zeros``, …"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.utils._device import _device_constructors

from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import FACTORIES, NEW, Function, named_like, placing
from torchspan.environment.patch import Patch, Replacement

ELSEWHERE = {"torch.fft": ("fftfreq", "rfftfreq"), "torch.nested": ("nested_tensor", "as_nested_tensor")}


def patches(redirection: Redirection) -> Iterable[Patch]:
    """One wrapper a function; names bound to them before follow."""
    _device_constructors()  # torch keeps this table of the functions themselves: it shall hold torch's own
    for name in FACTORIES:
        yield _replacement("torch", name, partial(_wrapped, redirection, name=f"torch.{name}"))
    for name in ("as_tensor", "asarray"):
        yield _replacement("torch", name, partial(_converting, redirection, name=f"torch.{name}"))
    for module, names in ELSEWHERE.items():
        for name in names:
            yield _replacement(module, name, partial(_wrapped, redirection, name=f"{module}.{name}", module=module))
    for name in NEW:
        build = partial(_wrapped, redirection, name=f"Tensor.{name}", module="torch._tensor")
        yield _replacement("torch", f"Tensor.{name}", build)


def _replacement(target: str, attribute: str, build: Callable[[Any], object]) -> Replacement:
    return Replacement("factories", target, attribute, build, follow=True)


def _wrapped(redirection: Redirection, old: Function, *, name: str, module: str = "torch") -> Function:
    placed = placing(redirection, old, name, module)
    if "cpu" not in redirection.kinds or name.startswith("Tensor.") or name.endswith("_like"):
        return placed

    def function(*args: Any, **kwargs: Any) -> Any:
        """What names no device asks for the CPU, which is redirected."""
        if kwargs.get("device") is None:
            kwargs["device"] = "cpu"
        return placed(*args, **kwargs)

    redirection.originals[id(function)] = old
    return named_like(function, old, module)


def _converting(redirection: Redirection, old: Function, *, name: str) -> Function:
    """``as_tensor`` and ``asarray``: the device may be positional, and what is given may be given back."""
    placed = placing(redirection, old, name, is_view=True)

    def function(*args: Any, **kwargs: Any) -> Any:
        if len(args) == 3 and "device" not in kwargs:
            *args, kwargs["device"] = args  # type: ignore[assignment]
        return placed(*args, **kwargs)

    redirection.originals[id(function)] = old
    return named_like(function, old, torch.__name__)
