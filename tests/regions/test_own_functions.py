"""An autograd.Function of the program's own, compiled: its gradients can be differentiated again as eager's can."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from torchspan.core.numerics import difference
from torchspan.regions.own_functions import differentiable

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it


class Square(torch.autograd.Function):
    """Saves its input."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return gradient * 2 * x


class Scaled(torch.autograd.Function):
    """Saves its output, keeps a number, and gives something that has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: int, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        grown, is_positive = x.exp(), x > 0
        ctx.factor = factor
        ctx.save_for_backward(grown, y)
        ctx.mark_non_differentiable(is_positive)
        return grown * y * factor, is_positive

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor, None, torch.Tensor]:
        grown, y = ctx.saved_tensors
        return gradient * grown * y * ctx.factor, None, gradient * grown * ctx.factor


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Scaled.apply(self.layer(Square.apply(x)), 3, x)[0]


def penalty(run: nn.Module, x: torch.Tensor) -> list[torch.Tensor | None]:
    """The gradients of a gradient's norm."""
    run.zero_grad()
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(run(x).sum(), x, create_graph=True)
    slope.square().sum().backward()
    return [x.grad, *(parameter.grad for parameter in run.parameters())]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch's own tracer does so
def test_a_penalty_on_gradients_of_an_own_function_has_eagers_gradients() -> None:
    eager, x = Model(), torch.randn(3, 4)
    model = copy.deepcopy(eager)
    torch._dynamo.reset()
    model.compile(backend=lambda graph, inputs: differentiable(graph).forward)
    assert difference(penalty(model, x), penalty(eager, x)) is None
