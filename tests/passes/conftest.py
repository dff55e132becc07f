"""Graphs to run passes on: a training step of one process, and one of eight ranks of which this process is the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from torchspan.capture.train_step import capture_train_step
from torchspan.core.graph import Graph
from torchspan.core.program import Program
from torchspan.models.llama3 import FLAVOURS, MODEL, Llama3
from torchspan.parallel.mesh import TP, Degrees, build_mesh, submesh
from torchspan.parallel.simple_fsdp import MixedPrecision, apply_simple_fsdp
from torchspan.parallel.tensor_parallel import apply_tensor_parallel


class Loss(nn.Module):
    """Cross-entropy of a model's logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.model(tokens).flatten(0, 1), labels.flatten())


@pytest.fixture
def tokens() -> tuple[Tensor, Tensor]:
    """Tokens and labels, (2, 8)."""
    draw = torch.Generator().manual_seed(1)
    return torch.randint(256, (2, 8), generator=draw), torch.randint(256, (2, 8), generator=draw)


@pytest.fixture
def program(tokens: tuple[Tensor, Tensor]) -> Program:
    """The step of a tiny Llama 3 in one process."""
    return Program(Loss(Llama3(FLAVOURS["tiny"]).init_weights(0)), tokens)


@pytest.fixture
def graph(program: Program) -> Graph:
    """Its training step."""
    return capture_train_step(program)


@pytest.fixture
def sharded(tokens: tuple[Tensor, Tensor]) -> Iterator[Callable[..., Graph]]:
    """The training step of the same model on a mesh of eight ranks; nothing is sent, so only shapes and counts are real."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())

    def capture(dp_shard: int = 4, tp: int = 2, capture: Any = capture_train_step, **precision: Any) -> Graph:
        mesh = build_mesh(Degrees(dp_shard, tp), 8)
        assert mesh is not None
        model = Llama3(FLAVOURS["tiny"]).init_weights(0)
        tp_mesh = submesh(mesh, TP)
        if tp_mesh is not None:
            apply_tensor_parallel(model, tp_mesh, MODEL.tensor_parallel)
        graph: Graph = capture(Program(Loss(apply_simple_fsdp(model, mesh, MixedPrecision(**precision))), tokens))
        return graph

    yield capture
    dist.destroy_process_group()
