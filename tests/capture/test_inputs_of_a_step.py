"""What a captured step takes: nested inputs, keywords and constants; what it says of a call that differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass

from torchspan.capture._state import BoundGraph
from torchspan.capture.joint import capture_joint, is_supported
from torchspan.capture.train_step import capture_train_step
from torchspan.core.errors import GraphError, GuardError
from torchspan.core.graph import Graph
from torchspan.core.program import Program


@dataclass(frozen=True)
class Batch:
    """What a model is trained on."""

    x_BD: Tensor
    targets: list[Tensor]
    weight: float | None = None


register_dataclass(Batch)


class Nested(nn.Module):
    """A loss of everything that it is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 2)

    def forward(self, batch: Batch, options: dict[str, Any], *, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
        y_BD = self.linear(batch.x_BD)
        for target in batch.targets:
            y_BD = y_BD - target
        y_BD = y_BD * options["scale"] * options["factor"]
        if batch.weight is not None:
            y_BD = y_BD * batch.weight
        if mask is not None:
            y_BD = torch.where(mask, y_BD, 0)
        return y_BD.square().mean() if reduction == "mean" else y_BD.square().sum()


def _call(seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    draw = torch.Generator().manual_seed(seed)
    batch = Batch(torch.randn(4, 3, generator=draw), [torch.randn(4, 2, generator=draw), torch.randn(2, generator=draw)], 0.5)
    options = {"scale": torch.rand(2, generator=draw), "factor": 3}
    return (batch, options), {"mask": torch.rand(4, 2, generator=draw) > 0.5, "reduction": "sum"}


_STEPS: dict[str, tuple[BoundGraph, Nested]] = {}


def _captured(capture: Callable[[Program], Graph]) -> tuple[BoundGraph, Nested]:
    """One capture for all tests of this file."""
    name = capture.__name__
    if name not in _STEPS:
        module = Nested()
        _STEPS[name] = BoundGraph(capture(Program(module, *_call())), module), module
    return _STEPS[name]


CAPTURES = [capture_train_step, *([capture_joint] if is_supported() else [])]


@pytest.mark.parametrize("capture", CAPTURES)
def test_nested_inputs_and_keywords_give_what_eager_gives(capture: Callable[[Program], Graph]) -> None:
    step, module = _captured(capture)
    names = [spec.name for spec in step.graph.inputs if spec.kind == "input"]
    assert names == ["0.x_BD", "0.targets.0", "0.targets.1", "1.scale", "mask"]
    eager = Nested()
    for seed in range(1, 4):
        args, kwargs = _call(seed)
        eager.zero_grad()
        loss = eager(*args, **kwargs)
        loss.backward()
        swapped = (args[0], dict(reversed(args[1].items())))  # a dict is the same one in any order
        assert torch.equal(step(*swapped, **dict(reversed(kwargs.items()))), loss)
        for actual, expected in zip(module.parameters(), eager.parameters()):
            assert torch.equal(actual.grad, expected.grad)  # type: ignore[arg-type]


def _changed(**options: Any) -> Callable[[Any, Any], Any]:
    return lambda args, kwargs: ((args[0], {**args[1], **options}), kwargs)


def _other_batch(**fields: Any) -> Callable[[Any, Any], Any]:
    return lambda args, kwargs: ((replace(args[0], **fields), args[1]), kwargs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_changed(factor=4), "input 1.factor is 4; the step was captured for 3; capture the step again for it"),
        (_changed(factor=3.0), "input 1.factor is 3.0; the step was captured for 3;"),
        (_changed(scale=None), "input 1.scale is None; the step was captured for a tensor there"),
        (_changed(scale=torch.ones(3)), r"input 1.scale has shape \(3,\); the step was captured for \(2,\)"),
        (_changed(scale=torch.ones(2).double()), "input 1.scale has dtype torch.float64; the step was captured for"),
        (_changed(scale=torch.ones(2, device="meta")), "input 1.scale has device meta; the step was captured for cpu"),
        (_changed(scale=torch.ones(2, requires_grad=True)), "input 1.scale requires a gradient"),
        (_changed(more=1), "input 1.more was given; the step was captured without it"),
        (_other_batch(targets=[torch.ones(4, 2)]), "input 0.targets.1 is missing; the step was captured with it"),
        (_other_batch(targets=(torch.ones(4, 2), torch.ones(2))), "input 0.targets is a tuple; the step was captured for a"),
        (_other_batch(weight=None), "input 0.weight is (None|missing); the step was captured"),
        (_other_batch(weight=torch.tensor(1.0)), r"input 0.weight is a tensor of shape \(\); the step was captured for 0.5"),
        (lambda args, kwargs: (args, {"reduction": "sum"}), "input mask is missing; the step was captured with it"),
        (lambda args, kwargs: (args[:1], {**kwargs, "options": args[1]}), "input 1 is missing; the step was captured with it"),
        (lambda args, kwargs: (({"x": args[0].x_BD}, args[1]), kwargs), "input 0 is a dict; the step was captured for a Batch"),
        (lambda args, kwargs: ((args[0].x_BD, args[1]), kwargs), r"input 0 is a tensor of shape \(4, 3\); the step was"),
    ],
)
def test_a_call_that_differs_is_told_where(change: Callable[[Any, Any], Any], message: str) -> None:
    step, _ = _captured(capture_train_step)
    args, kwargs = change(*_call(1))
    with pytest.raises(GuardError, match=message):
        step(*args, **kwargs)


def test_inputs_that_lie_otherwise_in_memory_are_the_same_values() -> None:
    step, _ = _captured(capture_train_step)
    args, kwargs = _call(1)
    transposed = replace(args[0], x_BD=args[0].x_BD.t().contiguous().t())
    assert torch.equal(step(transposed, args[1], **kwargs), step(*args, **kwargs))

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return (self.weight * x).sum()

    module = Sum()
    repeated = BoundGraph(capture_train_step(Program(module, (torch.ones(1).expand(3),))), module)
    with pytest.raises(GuardError, match=r"input 0 has strides \(1,\); .* repeats one value in memory, with strides \(0,\)"):
        repeated(torch.arange(3.0))


def test_a_pass_that_loses_what_the_graph_was_captured_for_is_told() -> None:
    step, module = _captured(capture_train_step)
    bare = torch.fx.GraphModule(step.graph.module, step.graph.module.graph)
    bare.meta = {}
    with pytest.raises(GraphError, match=r"does not say which inputs .*; a pass keeps module.meta .*forgetful"):
        BoundGraph(step.graph.with_module(bare, "forgetful"), module)


@pytest.mark.skipif(not is_supported(), reason="this torch exports no joint graph")
def test_a_tangent_is_one_in_the_precision_and_on_the_device_of_the_loss() -> None:
    for placement in ({"dtype": torch.bfloat16}, {"device": "meta"}):
        eager, captured = Nested().to(**placement), Nested().to(**placement)  # type: ignore[call-overload]
        args, _ = _call()
        batch = Batch(args[0].x_BD.to(**placement), [target.to(**placement) for target in args[0].targets])
        options = {"scale": args[1]["scale"].to(**placement), "factor": 2}
        loss = eager(batch, options)
        loss.backward()
        actual = BoundGraph(capture_joint(Program(captured, (batch, options))), captured)(batch, options)
        assert (actual.dtype, actual.device) == (loss.dtype, loss.device)
        gradient, expected = captured.linear.weight.grad, eager.linear.weight.grad
        assert gradient is not None and expected is not None and gradient.device == expected.device
        assert gradient.is_meta or torch.equal(gradient, expected)
