"""The two memories, the host's and the device's, where one stands in for both: where a tensor lies, as far as that is known.

A mark on the storage says it, which views, ``.detach()``, ``.data`` and parameters share with their tensor, and which pickles
do not keep. What an operator computes carries none: to follow every operator would cost more than most of them do. On torch 2.8
a mark is lost where nothing but garbage, such as torch.save leaves, refers to the storage's Python object: it is then unknown
where the tensor lies.

A tensor says truthfully that it is on the CPU, so ``y.to(x.device)`` would not tell the device from the host. The
``torch.device`` that a tensor answers is therefore one of the objects made here, equal to any other and known by identity.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch


class Memory(Enum):
    """Where a tensor lies, or where a program asks for one. What is neither of the two, such as ``meta``, is None."""

    HOST = "the host's"
    DEVICE = "the device's"
    UNKNOWN = "one of the two"


HOST, DEVICE, UNKNOWN = Memory.HOST, Memory.DEVICE, Memory.UNKNOWN
NO_STORAGE = (RuntimeError, NotImplementedError, ValueError)  # of what is sparse, functorch's, or a lazy module's
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
storage_of: Any = torch._C.TensorBase.untyped_storage


def memory_of(tensor: Any) -> Memory:
    """In which memory a tensor lies."""
    try:
        storage = storage_of(tensor) if type(tensor) in PLAIN else tensor.untyped_storage()
    except NO_STORAGE:
        return getattr(tensor, "_torchspan_memory", UNKNOWN)  # then a move copies more than it has to
    return getattr(storage, "_torchspan_memory", UNKNOWN)


def memory_of_storage(storage: Any) -> Memory:
    """In which memory a storage lies, typed or not."""
    return getattr(getattr(storage, "_untyped_storage", storage), "_torchspan_memory", UNKNOWN)


def mark(tensor: Any, memory: Memory | None) -> Any:
    """Remember that a tensor lies in `memory`, if that is known; returns the tensor."""
    if (memory is HOST or memory is DEVICE) and type(tensor) in PLAIN:
        try:
            storage_of(tensor)._torchspan_memory = memory
        except NO_STORAGE:
            return tensor
    return tensor


def mark_storage(storage: Any, memory: Memory | None) -> Any:
    """The same for a storage, typed or not."""
    if memory is HOST or memory is DEVICE:
        getattr(storage, "_untyped_storage", storage)._torchspan_memory = memory
    return storage


class Answers:
    """The ``torch.device`` objects that tensors answer, each of which says by its identity in which memory its tensor lies.

    `memories` has them by ``id``.
    """

    def __init__(self) -> None:
        self._devices: dict[tuple[torch.device, Memory], torch.device] = {}
        self.memories: dict[int, Memory] = {}

    def of(self, device: torch.device, memory: Memory) -> torch.device:
        """The object that is equal to `device` and stands for `memory`."""
        answer = self._devices.get((device, memory))
        if answer is None:
            index = () if device.index is None else (device.index,)
            answer = self._devices.setdefault((device, memory), torch.device(device.type, *index))
            self.memories[id(answer)] = memory  # the object lives as long as this does
        return answer
