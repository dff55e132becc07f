"""checkpoint_wrapper(early_stop=…): honoured, a frame at a time, with the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.environment.scope import Environment

pytestmark = pytest.mark.usefixtures("environment")


class Block(torch.nn.Module):
    """Counts how often each half runs; the backward needs nothing of the second half, so stopping early leaves it out."""

    def __init__(self, inner: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)
        self.inner = inner
        self.num_first = self.num_second = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_first += 1
        x = self.linear(x).sin()
        if self.inner is not None:
            x = self.inner(x)
        self.num_second += 1
        return x + 1


def wrapped(module: torch.nn.Module, **options: object) -> torch.nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(module, **options)


def train(module: torch.nn.Module) -> list[torch.Tensor]:
    module.zero_grad()
    module(torch.linspace(-1, 1, 6).reshape(2, 3).requires_grad_()).sum().backward()
    return [parameter.grad.clone() for parameter in module.parameters()]


@pytest.mark.parametrize(("options", "num_second"), [({"early_stop": True}, 1), ({"early_stop": False}, 2), ({}, 1)])
def test_early_stop_decides_what_is_recomputed_and_gradients_stay(options: dict[str, bool], num_second: int) -> None:
    torch.manual_seed(0)
    block = Block()
    expected = train(block)
    block.num_first = block.num_second = 0
    actual = train(wrapped(block, preserve_rng_state=False, **options))
    assert (block.num_first, block.num_second) == (2, num_second)
    assert all(torch.equal(actual, reference) for actual, reference in zip(actual, expected, strict=True))


def test_each_of_two_nested_frames_has_its_own() -> None:
    inner = Block()
    outer = Block(wrapped(inner, early_stop=True))
    train(wrapped(outer, early_stop=False))
    assert outer.num_second == 2, "the outer frame recomputes all"
    inner = Block()
    outer = Block(wrapped(inner, early_stop=False))
    train(wrapped(outer, early_stop=True))
    assert outer.num_second == 1, "the outer frame stops early"


@pytest.mark.parametrize(("early_stop", "num_second"), [(True, 1), (False, 2)])
def test_the_context_manager_wins_over_the_argument(early_stop: bool, num_second: int) -> None:
    block = Block()
    module = wrapped(block, early_stop=not early_stop)
    out = None
    with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
        out = module(torch.ones(2, 3, requires_grad=True))
    out.sum().backward()
    assert block.num_second == num_second


def test_a_checkpoint_function_of_the_users_gets_the_argument() -> None:
    values: list[object] = []

    def own(function, *args, early_stop=None):
        values.append(early_stop)
        return function(*args)

    train(wrapped(Block(), checkpoint_fn=own, early_stop=False))
    assert values == [False]


@pytest.mark.filterwarnings("ignore:Please specify CheckpointImpl.NO_REENTRANT:FutureWarning")
def test_the_reentrant_kind_takes_the_argument_and_recomputes_all() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl

    block = Block()
    train(wrapped(block, checkpoint_impl=CheckpointImpl.REENTRANT, early_stop=True))
    assert block.num_second == 2


def test_a_compiled_wrapper_has_no_graph_break_and_the_same_gradients() -> None:
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh())
    expected = train(block)
    module = wrapped(block, early_stop=False)
    actual = train(torch.compile(module, backend="aot_eager", fullgraph=True))
    assert all(torch.equal(actual, reference) for actual, reference in zip(actual, expected, strict=True))


def test_a_wrapper_that_was_made_keeps_working_after_undo_and_its_use_is_reported(environment: Environment) -> None:
    block = Block()
    module = wrapped(block, early_stop=False)
    subjects = [decision.subject for decision in environment.report.decisions]
    lacking = is_lacking(REGISTRY.get("checkpoint_early_stop").BACKPORT)
    assert subjects == (["checkpoint_wrapper(early_stop=False)"] if lacking else [])
    environment.deactivate()
    train(module)
    assert block.num_second == 2
    assert torch.utils.checkpoint.checkpoint is checkpoint
