"""Functions that make tensors: ``torch.zeros(3, device="cuda")``, ``zeros_like``, ``Tensor.new_zeros``, …"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.utils._device import _device_constructors

from torchspan.devices import _redirect
from torchspan.devices._memories import HOST, UNKNOWN, Memory, mark, memory_of
from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import BESIDE, FACTORIES, NEW, Function, in_single, is_compiling, named_like, placing
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
    if redirection.follows:
        return _followed(redirection, placed, old, name, module)
    if "cpu" not in redirection.kinds or name.startswith("Tensor.") or name.endswith("_like"):
        return placed

    def function(*args: Any, **kwargs: Any) -> Any:
        """What names no device asks for the CPU, which is redirected."""
        if kwargs.get("device") is None:
            kwargs["device"] = "cpu"
        return placed(*args, **kwargs)

    redirection.originals[id(function)] = old
    return named_like(function, old, module)


def _followed(redirection: Redirection, placed: Function, old: Function, name: str, module: str) -> Function:
    """`placed`, whose operators know the memory that is asked for, so that random numbers are drawn there."""
    from torchspan.devices._following import making

    function = making(redirection, placed, is_beside=name.startswith("Tensor.") or name.endswith(BESIDE))
    redirection.originals[id(function)] = old
    return named_like(function, old, module)


def _converting(redirection: Redirection, old: Function, *, name: str) -> Function:
    """``as_tensor`` and ``asarray``: they may return their argument itself, if it lies in the memory that is asked for."""

    def function(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if is_compiling():
            if device is not None and args and isinstance(args[0], torch.Tensor):
                args = (args[0].clone(), *args[1:])  # nothing says where it lies while the graph runs
            return placed(*args, **kwargs)
        target = redirection.lookup(device)
        if _redirect.in_force is not redirection:
            return old(*args, **kwargs)
        if not (redirection.in_use or target):
            return convert(*args, **kwargs)
        if target is not None:
            redirection.note(name, device)
            kwargs["device"] = target
        if not redirection.in_use:
            return convert(*args, **kwargs)
        return _converted(redirection, old, args, kwargs, _asked(redirection, device))

    placed = placing(redirection, old, name)
    convert = in_single(redirection, old, old, name, is_beside=True) if redirection.lacks_float64 else old
    redirection.originals[id(function)] = old
    return named_like(function, old, torch.__name__)


def _asked(redirection: Redirection, device: Any) -> Memory | None:
    """The memory that is asked for; None where the data stays in its own, which is the host's if it is no tensor."""
    if device is not None:
        return redirection.memory_asked(device)
    memory = redirection.default_memory()
    return None if memory is HOST else memory


def _converted(
    redirection: Redirection, old: Function, args: tuple[Any, ...], kwargs: dict[str, Any], memory: Memory | None
) -> Any:
    """``old(data, …)`` in `memory`: a copy, unless the data is known to lie there."""
    name = "obj" if "obj" in kwargs else "data"
    data: Any = args[0] if args else kwargs.get(name)
    is_tensor = isinstance(data, torch.Tensor)
    lies = memory_of(data) if is_tensor else HOST
    if memory is None or (memory is lies is not UNKNOWN):
        return mark(old(*args, **kwargs), lies)
    if kwargs.get("copy") is False:
        if lies is UNKNOWN or memory is UNKNOWN:
            return old(*args, **kwargs)
        raise ValueError(f"can't alias tensor from {lies.value} memory to {memory.value}: copy=False was asked for")
    if is_tensor:
        data = data.clone() if data.is_leaf and not data.requires_grad else data.to(data.device, copy=True)
        args, kwargs = ((data, *args[1:]), kwargs) if args else ((), {**kwargs, name: data})
        return mark(old(*args, **kwargs), memory)
    return mark(old(*args, **kwargs).clone(), memory)  # numpy's memory, say, is the host's
