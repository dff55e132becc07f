"""Reshard after forward: a gathered parameter is gathered again for the backward, and not kept meanwhile.

A policy beside the model. While a forward runs, every tensor that autograd saves is compared with the parameters that were
gathered in it; a view of one is saved as the rank's own part, and how to gather the whole. The second all-gather is part of the
backward, in eager and in a captured graph alike, and moves the same numbers: results are bitwise those without the policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef


class Resharding:
    """The policy for one module: what was gathered in the forward that is running."""

    def __init__(self, module: nn.Module) -> None:
        self._gathered: dict[int, tuple[StorageWeakRef, Callable[[], Tensor]]] = {}
        self._running: list[Any] = []
        module.register_forward_pre_hook(self._enter, prepend=True)
        module.register_forward_hook(self._leave, always_call=True)

    def note(self, whole: Tensor, gather: Callable[[], Tensor]) -> None:
        """`whole` was gathered; ``gather()`` gathers it again."""
        if self._running:
            reference = StorageWeakRef(whole.untyped_storage())  # while this is held, no other storage has its address
            self._gathered[reference.cdata] = (reference, gather)

    def _enter(self, *_: object) -> None:
        self._running.append(torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack))
        self._running[-1].__enter__()

    def _leave(self, *_: object) -> None:
        self._running.pop().__exit__()
        if not self._running:
            self._gathered.clear()

    def _pack(self, saved: Tensor) -> Any:
        local = saved.to_local() if isinstance(saved, DTensor) else saved
        gathered = self._gathered.get(StorageWeakRef(local.untyped_storage()).cdata)
        if gathered is None:
            return saved
        dtensor = (saved.device_mesh, saved.placements, saved.shape, saved.stride()) if isinstance(saved, DTensor) else None
        return _View(gathered[1], local.size(), local.stride(), local.storage_offset(), dtensor)


@dataclass(frozen=True)
class _View:
    """A view of a parameter that `gather` gathers again; `dtensor` is the mesh, placements, shape and stride of a DTensor."""

    gather: Callable[[], Tensor]
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any
    dtensor: tuple[Any, ...] | None


def _unpack(saved: Any) -> Tensor:
    if not isinstance(saved, _View):
        tensor: Tensor = saved
        return tensor
    local = saved.gather().as_strided(saved.size, saved.stride, saved.offset)
    if saved.dtensor is None:
        return local
    mesh, placements, shape, stride = saved.dtensor
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
