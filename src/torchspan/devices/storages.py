"""Storages: ``torch.UntypedStorage(4, device="cuda")``, ``storage.cuda()``, ``storage.to(device="cuda")``.

A move copies where a GPU's does.

A typed storage holds an untyped one and asks it for each of these.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial, wraps
from typing import Any

from torchspan.devices import _redirect
from torchspan.devices._redirect import Redirection, asked_by_torch
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
        if target is None:
            made = old(cls, *args, **kwargs)
            return made if asked_by_torch() else redirection.mark_host(made)  # a clone is torch's, of any storage
        redirection.note("torch.UntypedStorage", device)
        made = old(cls, *args, **{**kwargs, "device": target})
        made._torchspan_placed = True
        return made

    return staticmethod(new)


def _moved(redirection: Redirection, storage: Any, name: str, device: Any, move: Function) -> Any:
    """`storage` moved to where a request for `device` goes: a copy, unless the program has it there already."""
    redirection.note(f"UntypedStorage.{name}", device)
    if redirection.target != "cpu":
        return move()
    if hasattr(storage, "_torchspan_placed"):
        return storage
    moved = storage.clone()
    moved._torchspan_placed = True
    return moved


def _cuda(redirection: Redirection, old: Any) -> Function:
    @wraps(old)
    def cuda(self: Any, device: Any = None, non_blocking: bool = False) -> Any:
        asked = "cuda" if device is None else device
        target = redirection.lookup(asked)
        if target is None or _redirect.in_force is not redirection:
            return old(self, device, non_blocking)
        return _moved(redirection, self, "cuda", asked, lambda: self.to(device=target, non_blocking=non_blocking))

    return cuda


def _to(redirection: Redirection, old: Any) -> Function:
    @wraps(old)
    def to(self: Any, *, device: Any, non_blocking: bool = False) -> Any:
        target = redirection.lookup(device)
        if target is None or _redirect.in_force is not redirection:
            is_back = str(device).partition(":")[0] == "cpu"
            return self.cpu() if is_back else old(self, device=device, non_blocking=non_blocking)
        return _moved(redirection, self, "to", device, lambda: old(self, device=target, non_blocking=non_blocking))

    return to


def _cpu(redirection: Redirection, old: Any) -> Function:
    @wraps(old)
    def cpu(self: Any) -> Any:
        if not hasattr(self, "_torchspan_placed"):
            return old(self)
        return redirection.mark_host(self.clone())

    return cpu
