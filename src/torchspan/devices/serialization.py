"""Loading: ``torch.load(map_location="cuda")``, and checkpoints that were saved on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function
from torchspan.environment.patch import Patch, Redefinition


def patches(redirection: Redirection) -> Iterable[Patch]:
    """The one function that every location in a checkpoint goes through, and TorchScript's loader."""
    restore = partial(_restore, redirection)
    yield Redefinition("serialization", "torch.serialization", "default_restore_location", restore)
    yield Redefinition("serialization", "torch.jit._serialization", "load", partial(_jit_load, redirection))


def _restore(redirection: Redirection, old: Function) -> Function:
    def default_restore_location(storage: Any, location: str) -> Any:
        target = redirection.lookup(location)
        if target is None:
            return old(storage, location)
        redirection.note("torch.load, storage at", location)
        restored: Any = old(storage, str(target))
        if redirection.target == "cpu":
            marks = getattr(restored, "_untyped_storage", restored)
            marks._torchspan_placed = True
            vars(marks).pop("_torchspan_host", None)
        return restored

    return default_restore_location


def _jit_load(redirection: Redirection, old: Function) -> Function:
    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        target = redirection.lookup(map_location)
        if target is not None:
            redirection.note("torch.jit.load", map_location)
            map_location = target
        return old(f, map_location, *args, **kwargs)

    return load
