"""``torch.distributed.nn.SymmetricMemory``: one place for symmetric memory, wherever this torch keeps it.

Symmetric memory is memory of a GPU that every rank of a group can read and write directly. Torch has had it in a private module
since 2.5 and may move it. This class stands at one stable place: it asks what is possible, allocates and exchanges.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch

from torchspan.backports._base import Backport, Change, unavailable
from torchspan.core.errors import UnsupportedError

_PLACES = ("torch.distributed.symmetric_memory", "torch.distributed._symmetric_memory")
_VARIABLE = "TORCH_SYMMMEM"
_PADS = {name: f"{_PLACES[-1]}.{name}" for name in ("get_signal_pad_size", "set_signal_pad_size")}
_FIXED_PADS = "this torch's signal pads have one size"


@dataclass(frozen=True)
class SymmetricMemorySupport:
    """What symmetric memory can do on a device.

    `place` is the module of this torch that has it, `reason` why it cannot be used here (None where it can); `backends` are
    those that can be chosen, `has_multicast` whether the GPU's switch can add up and broadcast.
    """

    is_available: bool
    reason: str | None
    place: str | None
    backends: tuple[str, ...] = ()
    has_multicast: bool = False


class SymmetricMemory:
    """A tensor's memory on every rank of a group; made by :meth:`rendezvous`.

    Attributes and methods beside these are those of torch's own handle: ``rank``, ``world_size``, ``get_buffer``, ``barrier`` …

    >>> SymmetricMemory.query("cpu").is_available
    False
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    @staticmethod
    def query(device: torch.device | str = "cuda") -> SymmetricMemorySupport:
        """What symmetric memory can do on `device`; asks and allocates nothing."""
        module = _module()
        if module is None:
            return SymmetricMemorySupport(False, "this torch was built without distributed symmetric memory", None)
        reason = _why_not(torch.device(device))
        if reason is not None:
            return SymmetricMemorySupport(False, reason, module.__name__)
        nvshmem = ("NVSHMEM",) if module.is_nvshmem_available() else ()
        return SymmetricMemorySupport(True, None, module.__name__, ("CUDA", *nvshmem), _has_multicast(torch.device(device)))

    @staticmethod
    def empty(*size: Any, dtype: torch.dtype | None = None, device: torch.device | str = "cuda") -> torch.Tensor:
        """An uninitialized tensor of this `size` that can be exchanged; raises UnsupportedError where there is none."""
        target = torch.device(device)
        if target.type == "cuda" and target.index is None and torch.cuda.is_available():
            target = torch.device("cuda", torch.cuda.current_device())
        tensor: torch.Tensor = _required(target).empty(*size, dtype=dtype, device=target)
        return tensor

    @staticmethod
    def rendezvous(tensor: torch.Tensor, group: Any = None) -> SymmetricMemory:
        """Exchange `tensor`, from :meth:`empty`, with every rank of `group` (None: all); every rank must call it.

        Raises UnsupportedError where there is no symmetric memory.
        """
        module = _required(tensor.device)
        return SymmetricMemory(module.rendezvous(tensor, torch.distributed.group.WORLD if group is None else group))

    @staticmethod
    def set_backend(name: str) -> None:
        """Choose who allocates (``CUDA``, ``NVSHMEM``, ``NCCL``), before the first allocation."""
        module = _required(torch.device("cuda"))
        getattr(module, "set_backend", _set_backend)(name)


SymmetricMemory.__module__ = "torch.distributed.nn"


def _set_backend(name: str) -> None:
    """Choose who allocates symmetric memory; this torch decides that while it is loaded, by the variable TORCH_SYMMMEM.

    Raises UnsupportedError where that is another one, or where there is no symmetric memory.
    """
    _required(torch.device("cuda"))
    chosen = os.environ.get(_VARIABLE, "CUDA")
    if name != chosen:
        raise UnsupportedError(
            f"backend {name!r} of symmetric memory: this torch ({torch.__version__}) takes it from the variable {_VARIABLE} "
            f"when it is imported, which gave {chosen!r}; start the program with {_VARIABLE}={name}, or use torch 2.9 or later"
        )
    BACKPORT.record_use(f"{_PLACES[-1]}.set_backend")


def _get_backend(device: torch.device | str) -> str | None:
    """Who allocates symmetric memory on `device`; None where there is none."""
    if not SymmetricMemory.query(device).is_available:
        return None
    return os.environ.get(_VARIABLE, "CUDA")


def _module() -> ModuleType | None:
    """Torch's module of symmetric memory, or None."""
    if not torch.distributed.is_available():
        return None
    place = next((name for name in _PLACES if importlib.util.find_spec(name) is not None), None)
    return None if place is None else importlib.import_module(place)


def _why_not(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"symmetric memory is memory of CUDA GPUs, not of the device {str(device)!r}"
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} was built without CUDA"
    if (device.index or 0) >= torch.cuda.device_count():
        return f"there are {torch.cuda.device_count()} CUDA devices here, {str(device)!r} is not one of them"
    return None


def _required(device: torch.device) -> ModuleType:
    support = SymmetricMemory.query(device)
    if not support.is_available:
        raise UnsupportedError(
            f"no symmetric memory here: {support.reason}. Use collectives (torch.distributed.all_reduce …) instead; "
            "look at SymmetricMemory.query(device).is_available first"
        )
    assert support.place is not None
    return importlib.import_module(support.place)


def _has_multicast(device: torch.device) -> bool:
    from torch._C._autograd import DeviceType
    from torch._C._distributed_c10d import _SymmetricMemory

    return bool(_SymmetricMemory.has_multicast_support(DeviceType.CUDA, device.index or 0))


BACKPORT = Backport(
    name="symmetric_memory",
    summary="torch.distributed.nn.SymmetricMemory, with query, empty and rendezvous; set_backend, get_backend",
    target="torch.distributed.nn",
    upstream="https://github.com/pytorch/pytorch/tree/main/torch/distributed/_symmetric_memory",
    differs="no torch has the class at this place; it calls what this torch has in torch.distributed._symmetric_memory",
    names={"SymmetricMemory": lambda: SymmetricMemory},
    elsewhere={_PLACES[-1]: {name: partial(unavailable, place, _FIXED_PADS, "2.10.0") for name, place in _PADS.items()}},
    came={"2.10.0": tuple(_PADS.values())},
    also=(  # torch has them since 2.9
        Change("torch.distributed._symmetric_memory", "set_backend", lambda old: old or _set_backend, create=True),
        Change("torch.distributed._symmetric_memory", "get_backend", lambda old: old or _get_backend, create=True),
    ),
)
