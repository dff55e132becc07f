"""A rank's size and offset of a sharded dimension are those of torch.chunk."""

from __future__ import annotations

import itertools

import pytest
import torch

pytestmark = pytest.mark.usefixtures("environment")


def test_they_are_those_of_chunk() -> None:
    from torch.distributed.tensor import Shard

    for size, num_chunks in itertools.product(range(12), range(1, 6)):
        chunks = [*torch.arange(size).chunk(num_chunks)] if size else []
        for rank in range(num_chunks):
            expected = (len(chunks[rank]), int(chunks[rank][0])) if rank < len(chunks) else (0, size)
            assert Shard.local_shard_size_and_offset(size, num_chunks, rank) == expected
            assert Shard(1).local_shard_size_and_offset(size, num_chunks, rank) == expected
