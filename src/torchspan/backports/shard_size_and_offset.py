"""``Shard.local_shard_size_and_offset``: how much of a dimension a rank holds, and where that begins."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torchspan.backports._base import Backport, Change

_PLACE = "torch.distributed.tensor"


def local_shard_size_and_offset(curr_local_size: int, num_chunks: int, rank: int) -> tuple[int, int]:
    """The size and the start of chunk `rank` of a dimension that is cut as ``torch.chunk`` cuts it.

    >>> [local_shard_size_and_offset(10, 4, rank) for rank in range(4)]
    [(3, 0), (3, 3), (3, 6), (1, 9)]
    """
    size = (curr_local_size + num_chunks - 1) // num_chunks
    start = min(curr_local_size, size * rank)
    return min(curr_local_size, start + size) - start, start


_OURS = staticmethod(local_shard_size_and_offset)


def _lacks(module: ModuleType | None) -> bool:
    shard: Any = getattr(module, "Shard", object)
    return vars(shard).get("local_shard_size_and_offset", _OURS) is _OURS


BACKPORT = Backport(
    name="shard_size_and_offset",
    summary="a rank's size and offset of a sharded dimension: Shard.local_shard_size_and_offset",
    target=_PLACE,
    since="2.10.0",
    upstream="https://github.com/pytorch/pytorch/blob/v2.10.0/torch/distributed/tensor/placement_types.py",
    also=(Change("torch.distributed.tensor", "Shard.local_shard_size_and_offset", lambda old: old or _OURS, create=True),),
    lacks=_lacks,
)
