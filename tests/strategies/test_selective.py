"""A step is profiled, and what promises to pay is compiled: the figures are in the Report."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torchspan
from torchspan.strategies._step import Cost, Profiler, StepProfile, units_of
from torchspan.strategies.selective import MIN_CALL_S, decide

Wait = Callable[..., None]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"  # torch 2.13, when inductor is imported
)


def doubles(graph: Any, inputs: Any) -> Any:
    """A backend whose results show where it was at work."""
    return lambda *args: tuple(2 * output for output in graph.forward(*args))


def as_it_is(graph: Any, inputs: Any) -> Any:
    return graph.forward


class Pointwise(nn.Module):
    """Many operations that fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            x = (x * 1.01).tanh()
        return x


class Product(nn.Module):
    """One operation of a library."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Mixed(nn.Module):
    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.products = nn.ModuleList(Product(width) for _ in range(2))
        self.pointwise = nn.ModuleList(Pointwise() for _ in range(2))
        self.unused = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for product, pointwise in zip(self.products, self.pointwise, strict=True):
            x = pointwise(product(x))
        return x


def test_a_profile_tells_what_fuses_from_what_a_library_does_and_leaves_no_hook() -> None:
    model = Mixed().eval()
    profiler, x = Profiler(model), torch.randn(256, 256)
    assert [profiler.takes_turn() for _ in range(3)] == [False, True, False]
    model(x)
    outputs, profile = profiler.run((x,), {})
    assert torch.equal(outputs, model(x))
    products, pointwise, unused = profile.costs
    assert (products.name, products.calls, pointwise.name, pointwise.calls) == ("Product ×2", 2, "Pointwise ×2", 2)
    assert products.fusible_s < 0.2 * products.seconds and pointwise.fusible_s > 0.8 * pointwise.seconds > 0
    assert (unused.name, unused.calls, unused.seconds) == ("unused", 0, 0.0)
    assert products.seconds + pointwise.seconds <= profile.seconds
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_step_that_raises_leaves_no_hook_either() -> None:
    model = Mixed()
    with pytest.raises(RuntimeError):
        Profiler(model).run((torch.randn(3, 3),), {})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_gradients_flow_through_a_profiled_step() -> None:
    model, x = Mixed(), torch.randn(8, 256)
    expected = torch.autograd.grad(model(x).sum(), list(model.products.parameters()))
    outputs, _ = Profiler(model).run((x,), {})
    for gradient, other in zip(torch.autograd.grad(outputs.sum(), list(model.products.parameters())), expected, strict=True):
        assert torch.equal(gradient, other)


def test_units_are_the_blocks_and_the_outermost_modules_without_any() -> None:
    model = Mixed()
    assert units_of(model) == [*model.products, *model.pointwise, model.unused]


def test_what_is_small_in_the_step_or_in_a_call_is_left_eager() -> None:
    large, small, often = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)
    costs = (
        Cost("large", (large,), 1, 0.5, 0.4),
        Cost("small", (small,), 1, 0.04, 0.04),
        Cost("often", (often,), 100_000, 0.46, 0.9 * MIN_CALL_S * 100_000),
    )
    result = decide(StepProfile(1.0, costs))
    assert [part.targets for part in result.parts] == [(large,)]
    assert "large 50 %, 40 % fusible; often 46 %, " in result.reason and "small 4 %, 4 % fusible: left eager" in result.reason


def test_only_what_pays_is_compiled_and_the_figures_are_decisions(until: Wait) -> None:
    model, x = Mixed().eval(), torch.randn(256, 256)
    compiled = torchspan.compile(model, strategy="selective", backend=doubles, verify="off")
    with torch.no_grad():
        expected = model(x)
        for _ in range(2):
            assert torch.equal(compiled(x), expected)
        until(lambda: bool(compiled.report.attempts), lambda: compiled(x))
        doubled = x
        for product, pointwise in zip(model.products, model.pointwise, strict=True):
            doubled = 2 * pointwise(product(doubled))
        torch.testing.assert_close(compiled(x), doubled)
        assert torch.equal(model(x), expected)
    ladder, profiled, chosen = compiled.report.decisions[:3]
    assert [ladder.choice, profiled.choice, chosen.choice] == ["selective → eager", "profile", "selective"]
    assert "ms in operations (forward)" in chosen.reason and "Product ×2" in chosen.reason
    assert [(attempt.strategy, attempt.region) for attempt in compiled.report.attempts] == [("selective", "Pointwise ×2")]


def test_where_nothing_pays_everything_is_eager_and_the_report_says_why() -> None:
    compiled, x = torchspan.compile(nn.Sequential(nn.Linear(2, 2)), strategy="selective"), torch.ones(1, 2)
    for _ in range(3):
        compiled(x)
    assert [decision.choice for decision in compiled.report.decisions] == [
        "selective → eager",
        "profile",
        "not selective",
        "eager",
    ]
    assert compiled.report.attempts == ()
    function = torchspan.compile(abs, strategy="selective")
    assert [decision.choice for decision in function.report.decisions][1:] == ["not selective", "eager"]


def test_one_of_many_threads_profiles_and_the_others_go_on() -> None:
    model, x = Mixed(16).eval(), torch.randn(4, 16)
    compiled = torchspan.compile(model, strategy="selective", backend=as_it_is)
    expected = model(x)
    wrong: list[bool] = []

    def call() -> None:
        for _ in range(5):
            wrong.append(not torch.equal(compiled(x), expected))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(wrong)
    choices = [decision.choice for decision in compiled.report.decisions]
    assert choices.count("selective") + choices.count("not selective") == 1
