"""Loading: ``torch.load(map_location="cuda")``, and checkpoints that were saved on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torchspan.devices._memories import DEVICE, HOST, mark_storage
from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function
from torchspan.environment.patch import Patch, Redefinition


def patches(redirection: Redirection) -> Iterable[Patch]:
    """The one function that every location in a checkpoint goes through, what chooses it, and TorchScript's loader."""
    restore = partial(_restore, redirection)
    yield Redefinition("serialization", "torch.serialization", "default_restore_location", restore)
    yield Redefinition("serialization", "torch.serialization", "_get_restore_location", partial(_chosen, redirection))
    yield Redefinition("serialization", "torch.jit._serialization", "load", partial(_jit_load, redirection))


def _restore(redirection: Redirection, old: Function) -> Function:
    def default_restore_location(storage: Any, location: str) -> Any:
        target = redirection.lookup(location)
        if target is None:
            restored = old(storage, location)
            return mark_storage(restored, HOST) if redirection.in_use and location == "cpu" else restored
        redirection.note("torch.load, storage at", location)
        restored = old(storage, str(target))
        return mark_storage(restored, redirection.memory_asked(location)) if redirection.in_use else restored

    return default_restore_location


def _chosen(redirection: Redirection, old: Function) -> Function:
    """``map_location``: a device that a tensor answered means that tensor's memory; a function is given what is on the host."""

    def _get_restore_location(map_location: Any) -> Function:
        memory = redirection.answers.memories.get(id(map_location))
        if memory is DEVICE:
            return old(redirection.ordinal())
        if memory is None and not callable(map_location):
            return old(map_location)
        restore = old(map_location)

        def restore_location(storage: Any, location: str) -> Any:
            if memory is not None:
                return storage  # where that tensor lies is not known
            if redirection.in_use:
                mark_storage(storage, HOST)
            return restore(storage, location)

        return restore_location

    return _get_restore_location


def _jit_load(redirection: Redirection, old: Function) -> Function:
    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        target = redirection.lookup(map_location)
        if target is not None:
            redirection.note("torch.jit.load", map_location)
            map_location = target
        return old(f, map_location, *args, **kwargs)

    return load
