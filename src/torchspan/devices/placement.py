"""Where a tensor lies, when one memory stands in for the host's and the device's: what is known of it, and what tells it.

The factories, moves and loads of the other rules mark what they make. Here are the rest: what is made of numpy's memory, by
``torch.Tensor([1.])``, by ``module.half()``; and the ``torch.device`` that a tensor answers, which tells by its identity where
the tensor lies, so that ``y.to(x.device)`` means what it means on a GPU (see ``_memories``).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial, wraps
from itertools import chain
from typing import Any

import torch

from torchspan.devices._memories import DEVICE, HOST, PLAIN, UNKNOWN, mark, memory_of
from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function, is_compiling, named_like
from torchspan.environment.patch import Patch, Redefinition, Replacement

_CONVERSIONS = ("half", "float", "double", "bfloat16", "type")


def patches(redirection: Redirection) -> Iterable[Patch]:
    """Nothing where the target has a memory of its own."""
    if redirection.target != "cpu":
        return
    for name in ("from_numpy", "frombuffer"):
        yield Replacement("placement", "torch", name, partial(_of_the_host, redirection), follow=True)
    yield Replacement("placement", "torch", "Tensor.__new__", partial(_constructed, redirection))
    yield Replacement("placement", "torch.nn.parameter", "Parameter.__deepcopy__", partial(_copied, redirection))
    for name in _CONVERSIONS:
        yield Replacement("placement", "torch.nn.modules.module", f"Module.{name}", partial(_staying, redirection))
    if redirection.masquerade:
        return  # which has answers of its own
    yield Replacement("placement", "torch", "Tensor.device", partial(_device, redirection))
    yield Replacement("placement", "torch.storage", "UntypedStorage.device", partial(_storage_device, redirection))
    yield Redefinition("placement", "torch", "get_default_device", partial(_default_device, redirection))


def _of_the_host(redirection: Redirection, old: Any) -> Function:
    def function(*args: Any, **kwargs: Any) -> Any:
        tensor = old(*args, **kwargs)
        return tensor if not redirection.in_use or is_compiling() else mark(tensor, HOST)

    redirection.originals[id(function)] = old
    return named_like(function, old, torch.__name__)


def _constructed(redirection: Redirection, old: Any) -> staticmethod[..., Any]:
    """``torch.Tensor([1.])``: on the CPU, as is what a subclass makes so."""

    @wraps(old)
    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        tensor = old(cls, *args, **kwargs)
        is_of_tensor = bool(args) and isinstance(args[0], torch.Tensor)
        if is_of_tensor or not redirection.in_use or is_compiling() or memory_of(tensor) is not UNKNOWN:
            return tensor
        return mark(tensor, redirection.default_memory())

    return staticmethod(new)


def _copied(redirection: Redirection, old: Any) -> Function:
    """A parameter's copy lies where the parameter does."""

    @wraps(old)
    def __deepcopy__(self: Any, memo: Any) -> Any:
        result = old(self, memo)
        return mark(result, memory_of(self)) if redirection.in_use else result

    return __deepcopy__


def _staying(redirection: Redirection, old: Any) -> Function:
    """``Module.half`` and its like: what they compute lies where it was computed from."""

    @wraps(old)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not redirection.in_use or is_compiling():
            return old(self, *args, **kwargs)
        before = [memory_of(tensor) for tensor in _tensors(self)]
        result = old(self, *args, **kwargs)
        for tensor, memory in zip(_tensors(self), before):
            if memory_of(tensor) is UNKNOWN:
                mark(tensor, memory)
        return result

    return method


def _tensors(module: Any) -> Iterable[torch.Tensor]:
    return chain(module.parameters(), module.buffers())


def _device(redirection: Redirection, old: Any) -> property:
    read, host = old.__get__, torch.device("cpu")
    there, here, one_of_them = (redirection.answers.of(host, memory) for memory in (DEVICE, HOST, UNKNOWN))

    def get(self: Any) -> torch.device:
        device: torch.device = read(self)
        if not redirection.in_use or device != host:
            return device
        memory = memory_of(self) if type(self) in PLAIN else UNKNOWN  # another may answer for itself
        return there if memory is DEVICE else here if memory is HOST else one_of_them

    return property(get, doc=old.__doc__)


def _storage_device(redirection: Redirection, old: Any) -> property:
    read = old.__get__

    def get(self: Any) -> torch.device:
        device: torch.device = read(self)
        return redirection.answer(self, device) if redirection.in_use else device

    return property(get, doc=old.__doc__)


def _default_device(redirection: Redirection, old: Function) -> Function:
    def get_default_device() -> torch.device:
        device: torch.device = old()
        memory = redirection.default_memory() if redirection.in_use else HOST
        return device if memory is None or memory is HOST else redirection.answers.of(device, memory)

    return get_default_device
