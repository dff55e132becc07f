"""A group of FSDP of which the model runs one module, and the program another later: gradients are those of the plain model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

pytestmark = pytest.mark.usefixtures("environment")


class Model(nn.Module):
    """A body and a norm; the head is run by what computes the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.body(x))


def step(model: Any, x: torch.Tensor) -> torch.Tensor:
    """The loss of a step whose head takes two parts of `x` one after the other; the parameters get their gradients."""
    is_sharded = hasattr(model.head, "set_requires_gradient_sync")
    hidden = model(x)
    parts = [part.detach().requires_grad_() for part in hidden.chunk(3)]
    losses = []
    for part in parts:
        if is_sharded:
            model.head.set_requires_gradient_sync(part is parts[-1], recurse=False)
        losses.append(model.head(part).square().sum())
        losses[-1].backward()
    if is_sharded:
        model.head.reshard()
    hidden.backward(torch.cat([part.grad for part in parts if part.grad is not None]))
    return torch.stack(losses).sum().detach()


def test_gradients_are_the_plain_models_in_every_step() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        plain, x = Model(), torch.randn(6, 4)
        model: Any = copy.deepcopy(plain)
        mesh = init_device_mesh("cpu", (1,))
        fully_shard([model.norm, model.head], mesh=mesh, reshard_after_forward=False)
        fully_shard(model, mesh=mesh)
        for _ in range(2):
            model.zero_grad()
            plain.zero_grad()
            torch.testing.assert_close(step(model, x), step(plain, x))
            for parameter, expected in zip(model.parameters(), plain.parameters()):
                torch.testing.assert_close(parameter.grad.full_tensor(), expected.grad)
    finally:
        dist.destroy_process_group()
