"""The option skip_fwd_side_effects_in_bwd_under_checkpoint: checkpoints with effects give eager's loss and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.environment.scope import Environment

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # dynamo's imports, from 2.13 on

OURS = is_lacking(REGISTRY.get("checkpoint_side_effects").BACKPORT)
OPTION = "skip_fwd_side_effects_in_bwd_under_checkpoint"


class Counting(torch.nn.Module):
    """Counts its calls, inside a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.num_calls = 0

    def block(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        return self.linear(x).relu()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


def test_a_compiled_checkpoint_with_effects_has_eagers_output_and_gradient(environment: Environment) -> None:
    model, x = Counting(), torch.randn(4, 8)
    expected = model(x)
    (gradient,) = torch.autograd.grad(expected.sum(), model.linear.weight)
    model.num_calls = 0
    with torch._dynamo.config.patch({OPTION: True}):
        actual = torch.compile(model, backend="aot_eager")(x)
        torch.testing.assert_close(actual, expected)
        assert model.num_calls == 1
        torch.testing.assert_close(torch.autograd.grad(actual.sum(), model.linear.weight)[0], gradient)
    choices = [decision.choice for decision in environment.report.decisions if OPTION in decision.subject]
    assert choices == (["the checkpointed function runs eagerly"] if OURS else [])


def test_without_effects_it_is_compiled_whole_and_nothing_is_reported(environment: Environment) -> None:
    linear, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
    with torch._dynamo.config.patch({OPTION: True}):
        compiled = torch.compile(lambda x: checkpoint(linear, x, use_reentrant=False), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), linear(x))
    assert not [decision for decision in environment.report.decisions if OPTION in decision.subject]


def test_it_is_false_until_it_is_set(environment: Environment) -> None:
    import torch._dynamo.config as config

    assert getattr(config, OPTION) is False
    setattr(config, OPTION, True)
    assert getattr(config, OPTION) is True
    setattr(config, OPTION, False)
