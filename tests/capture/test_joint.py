"""What only a joint graph can get wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from torchspan.capture.joint import capture_joint, is_supported
from torchspan.capture.train_step import capture_train_step
from torchspan.core.errors import CaptureError
from torchspan.core.program import Program
from torchspan.parallel.mesh import Degrees, build_meshes

pytestmark = pytest.mark.skipif(not is_supported(), reason="this torch exports no joint graph (2.10 and later do)")


class PartialGradient(nn.Module):
    """A weight that every rank has whole, of which each computes a part of the gradient."""

    def __init__(self, mesh: object) -> None:
        super().__init__()
        self.mesh = mesh
        self.weight = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, (Replicate(),)))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        split = DTensor.from_local(x, self.mesh, (Shard(0),), run_check=False)  # type: ignore[arg-type]
        return (split * self.weight).sum().full_tensor()


def test_a_gradient_that_is_partial_is_refused_and_train_step_sums_it(fake_ranks: int) -> None:
    module = PartialGradient(build_meshes(Degrees(8, 1), fake_ranks).dense)
    x = torch.randn(2, 4)
    with pytest.raises(CaptureError, match=r"the gradient of weight is laid out as .*Partial.*or capture with train_step"):
        capture_joint(Program(module, (x,)))
    before = capture_train_step(Program(module, (x,))).num_collectives()
    assert before["all_reduce"] == 2  # of the loss, and of the gradient


def test_a_tangent_is_the_last_input_and_means_the_loss() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(3.0))

        def forward(self, x: Tensor) -> Tensor:
            return (self.weight * x).square()

    graph = capture_joint(Program(Square(), (torch.tensor(2.0),)))
    assert [spec.kind for spec in graph.inputs] == ["parameter", "input", "tangent"]
    loss, gradient = graph.module(torch.tensor(3.0), torch.tensor(2.0), torch.tensor(10.0))
    assert (loss.item(), gradient.item()) == (36.0, 240.0)


def test_sharded_parameters_without_numbers_are_refused_with_what_takes_them(fake_ranks: int) -> None:
    mesh = build_meshes(Degrees(8, 1), fake_ranks).dense
    assert mesh is not None
    with torch.device("meta"):
        module = PartialGradient(mesh)
    with pytest.raises(CaptureError, match=r"DTensors on the meta device.*capture with train_step"):
        capture_joint(Program(module, (torch.empty(2, 4, device="meta"),)))
