"""Storages: ``torch.UntypedStorage(4, device="cuda")``, ``storage.cuda()``, ``storage.to(device="cuda")``.

A move copies where a GPU's does.

A typed storage holds an untyped one and asks it for each of these.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial, wraps
from typing import Any

from torchspan.devices import _redirect
from torchspan.devices._memories import DEVICE, HOST, UNKNOWN, Memory, mark_storage, memory_of_storage
from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function
from torchspan.environment.patch import Patch, Replacement


def patches(redirection: Redirection) -> Iterable[Patch]:
    """The constructor, and the moves that every storage inherits."""
    yield Replacement("storages", "torch.storage", "UntypedStorage.__new__", partial(_new, redirection))
    for name, build in {"cuda": _cuda, "to": _to, "cpu": _cpu}.items():
        yield Replacement("storages", "torch.storage", f"_StorageBase.{name}", partial(build, redirection))


def _new(redirection: Redirection, old: Any) -> staticmethod[..., Any]:
    @wraps(old)
    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        target = None if device is None or _redirect.in_force is not redirection else redirection.lookup(device)
        if target is not None:
            redirection.note("torch.UntypedStorage", device)
            kwargs["device"] = target
        storage = old(cls, *args, **kwargs)
        if not redirection.in_use:
            return storage
        return mark_storage(storage, HOST if device is None else redirection.memory_asked(device))

    return staticmethod(new)


def _brought(redirection: Redirection, storage: Any, memory: Memory) -> Any:
    """`storage` moved to `memory`: a copy, unless it is known to lie there."""
    lies = memory_of_storage(storage)
    if lies is memory and lies is not UNKNOWN:
        return storage
    if lies is UNKNOWN:
        redirection.say_result_copied()
    return mark_storage(storage.clone(), memory)


def _cuda(redirection: Redirection, old: Any) -> Function:
    @wraps(old)
    def cuda(self: Any, device: Any = None, non_blocking: bool = False) -> Any:
        request = "cuda" if device is None else device
        target = redirection.lookup(request)
        if target is None or _redirect.in_force is not redirection:
            return old(self, device, non_blocking)
        redirection.note("UntypedStorage.cuda", request)
        if not redirection.in_use:
            is_waiting = non_blocking and redirection.waits_for_copy("UntypedStorage.cuda", self.device, target)
            return self.to(device=target, non_blocking=non_blocking and not is_waiting)
        return _brought(redirection, self, DEVICE)

    return cuda


def _to(redirection: Redirection, old: Any) -> Function:
    @wraps(old)
    def to(self: Any, *, device: Any, non_blocking: bool = False) -> Any:
        target = redirection.lookup(device)
        if _redirect.in_force is not redirection or (target is None and not redirection.in_use):
            return old(self, device=device, non_blocking=non_blocking)
        memory = redirection.memory_asked(device)
        if target is not None:
            redirection.note("UntypedStorage.to", device)
        if non_blocking and redirection.waits_for_copy("UntypedStorage.to", self.device, target or device):
            non_blocking = False
        if memory is None or not redirection.in_use:
            return old(self, device=device if target is None else target, non_blocking=non_blocking)
        return _brought(redirection, self, memory)

    return to


def _cpu(redirection: Redirection, old: Any) -> Function:
    @wraps(old)
    def cpu(self: Any) -> Any:
        if not redirection.in_use or self.device.type != "cpu":
            return old(self)
        return _brought(redirection, self, HOST)

    return cpu
