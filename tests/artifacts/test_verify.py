"""What a compiler made is held to its operators when an artifact is made."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from torchspan.artifacts import load, precompile
from torchspan.artifacts.instructions import write_program
from torchspan.artifacts.numbers_check import Parts, check_numbers
from torchspan.core.errors import CompileError

# torch scripts a module of its own when inductor is first imported, and deprecated that
pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script(_method)?` is deprecated:DeprecationWarning")


class Five(nn.Module):
    """In its backward, the C++ code of torch 2.8 and 2.13 reads a buffer before another loop has added to it."""

    def forward(self, x: Tensor) -> Any:
        return x.unfold(0, 2, 1).sum(-1), x.repeat(2, 1), x.norm(), x * x.numel(), x.std(0)


@pytest.mark.slow
def test_a_compiler_that_gets_a_number_wrong_makes_no_artifact(tmp_path: Any) -> None:
    x = torch.randn(6, 4, requires_grad=True)
    refused = ""
    try:
        artifact = precompile(Five(), (x,))
    except CompileError as cause:
        refused = str(cause)
    if refused:
        assert re.search(r"the backward of Five, compiled, gives other numbers .*compiler='eager'", refused)
        return
    fast = load(artifact.save(tmp_path / "five.tspan"), Five())
    gradients = []
    for call in (fast, Five()):
        sum((part * torch.arange(part.numel()).view(part.shape).sin()).sum() for part in call(x)).backward()
        gradients.append(x.grad)
        x.grad = None
    torch.testing.assert_close(*gradients)


def test_numbers_that_differ_are_named_and_equal_ones_pass() -> None:
    def parts(factor: float) -> tuple[dict[str, Any], dict[str, Any]]:
        graphs = {"forward": make_fx(lambda x: (x * factor, x.sum()))(torch.ones(3)), "backward": None}
        counts = {"mutated": [], "outputs": [{}, {}], "num_bases": 0}
        return graphs, {"forward": write_program(graphs["forward"], {})[0], "backward": None, **counts}

    graphs, plan = parts(2.0)
    _, other = parts(2.1)
    empty = Parts({"libraries": [], "constants": None})
    check_numbers(graphs, plan, empty, [torch.arange(1.0, 4.0)], {}, "Double")
    with pytest.raises(CompileError, match=r"the forward of Double, compiled, .*output\[0\]: 3 of 3 elements differ"):
        check_numbers(graphs, other, empty, [torch.arange(1.0, 4.0)], {}, "Double")


@pytest.mark.slow
@pytest.mark.once
def test_a_gradient_that_is_zero_but_for_rounding_is_no_other_number() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))  # the norm takes away what the bias adds
    assert precompile(model, (torch.randn(4, 3, 16, 16),)).programs


class Mixed(nn.Module):
    """In bfloat16 inside, which neither its inputs nor its outputs tell: compiled, roundings between operators are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.last(torch.nn.functional.gelu(self.norm(self.first(x))))
        return y.float() + x


@pytest.mark.slow
@pytest.mark.once
def test_numbers_are_held_to_the_lowest_precision_that_they_pass_through() -> None:
    torch.manual_seed(0)
    assert precompile(Mixed(), (torch.randn(3, 8),)).programs


@pytest.mark.slow
@pytest.mark.once
def test_random_numbers_are_drawn_alike_and_none_is_used_up() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), torch.randn(64, 4)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    precompile(model, (x,))
    assert torch.equal(torch.rand(2), expected)
