"""An index into a DTensor gives its part of the tensor, and gives it again."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

pytestmark = pytest.mark.usefixtures("environment")


def test_parts_of_a_tensor_are_asked_for_one_after_the_other() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh, whole = init_device_mesh("cpu", (1,)), torch.arange(24.0).view(2, 3, 4)
        for placement in (Replicate(), Shard(0)):
            tensor = distribute_tensor(whole, mesh, [placement])
            for index in range(3):
                part = tensor[:, index]
                assert part.shape == (2, 4) and tensor.shape == (2, 3, 4)
                assert torch.equal(part.reshape(-1).full_tensor(), whole[:, index].reshape(-1))
    finally:
        dist.destroy_process_group()
