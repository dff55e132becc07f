"""safe_compile, partial_compile and smart_compile: one flow under three names, its default policy and what overrules it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import torchspan
from torchspan.core.errors import InputError, UnknownNameError
from torchspan.jobs.budget import Budget
from torchspan.strategies import _measured

Wait = Callable[..., None]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"  # torch 2.13, when inductor is imported
)


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    _measured.forget()
    yield
    _measured.forget()


def doubles(graph: Any, inputs: Any) -> Any:
    """A backend whose results show where it was at work."""
    return lambda *args: tuple(2 * output for output in graph.forward(*args))


def as_it_is(graph: Any, inputs: Any) -> Any:
    return graph.forward


def sleeps(graph: Any, inputs: Any) -> Any:
    time.sleep(1000)


def takes_small_graphs(graph: Any, inputs: Any) -> Any:
    if sum(node.op == "call_function" for node in graph.graph.nodes) > 10:
        raise RuntimeError("too large")
    return graph.forward


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Deep(nn.Module):
    """`num` equal layers; without `repeated`, layers of one kind each."""

    def __init__(self, num: int, width: int = 2, repeated: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width + (0 if repeated else i)) for i in range(num))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def huge(billions: float, **kind: Any) -> nn.Module:
    """A model of so many parameters that takes no memory."""
    with torch.device("meta"):
        return Deep(10, int((billions * 1e8) ** 0.5), **kind)


def choices(compiled: Any) -> list[str]:
    return [decision.choice for decision in compiled.report.decisions]


# the default policy


@pytest.mark.parametrize(
    ("billions", "budget", "ladder", "because"),
    [
        (0.5, None, "whole → per_block → eager", "below 1 billion the whole program is tried first"),
        (5, None, "whole → per_block → eager", "from 1 to 10 billion the whole program gets a part of the budget"),
        (20, None, "per_block → eager", "from 10 to 40 billion only repeated blocks are compiled"),
        (20, Budget(seconds=9), "per_block → eager", "from 10 to 40 billion only repeated blocks are compiled"),
        (50, None, "eager", "above 40 billion nothing is compiled unless a budget is given"),
        (50, Budget(seconds=9), "per_block → eager", "above 40 billion repeated blocks, because a budget was given"),
    ],
)
def test_smart_compile_goes_by_size_and_says_so(billions: float, budget: Budget | None, ladder: str, because: str) -> None:
    compiled = torchspan.smart_compile(huge(billions), budget=budget)
    decision = compiled.report.decisions[0]
    assert (decision.topic, decision.choice) == ("compile", ladder)
    assert because in decision.reason and "billion parameters" in decision.reason


def test_twenty_billion_parameters_are_compiled_by_block(until: Wait) -> None:
    model = huge(20)
    compiled = torchspan.smart_compile(model, backend=as_it_is, verify="off")  # there are no numbers to compare
    x = torch.empty(1, model.layers[0].inner.in_features, device="meta")
    until(lambda: bool(compiled.report.attempts), lambda: compiled(x))
    (attempt,) = compiled.report.attempts
    assert (attempt.strategy, attempt.region, attempt.outcome, attempt.cause) == ("per_block", "Layer ×10", "compiled", None)
    assert compiled(x).shape == x.shape


def test_what_timed_out_is_not_tried_again_on_an_equal_model_unless_there_is_more_budget(until: Wait) -> None:
    first = torchspan.safe_compile(Deep(3), backend=sleeps, budget=Budget(seconds=3))
    x = torch.ones(1, 2)
    until(lambda: bool(first.report.attempts), lambda: first(x))
    assert first.report.attempts[0].outcome == "timeout"
    decision = torchspan.smart_compile(Deep(3), backend=sleeps, budget=Budget(seconds=3)).report.decisions[0]
    assert decision.choice == "per_block → eager"
    assert decision.reason.startswith("measured on an equal program: whole, timeout after ")
    assert "by default: 1.2e-08 billion parameters: below 1 billion" in decision.reason
    for other in (
        torchspan.smart_compile(Deep(3), backend=sleeps, budget=Budget(seconds=30)),
        torchspan.smart_compile(Deep(4), backend=sleeps, budget=Budget(seconds=3)),
        torchspan.smart_compile(Deep(3), backend=as_it_is, budget=Budget(seconds=3)),
    ):
        assert choices(other)[0] == "whole → per_block → eager"
    assert choices(torchspan.compile(Deep(3), strategy="whole", backend=sleeps, budget=Budget(seconds=3)))[0] == "whole → eager"


def test_what_compiled_is_tried_where_the_size_alone_would_not_have_it(until: Wait) -> None:
    model = huge(50)
    x = torch.empty(1, model.layers[0].inner.in_features, device="meta")
    first = torchspan.partial_compile(model, backend=as_it_is, verify="off")
    until(lambda: bool(first.report.attempts), lambda: first(x))
    assert first.report.attempts[0].outcome == "compiled", first.report.attempts
    decision = torchspan.smart_compile(huge(50), backend=as_it_is).report.decisions[0]
    assert decision.choice == "per_block → eager"
    assert decision.reason.startswith("measured on an equal program: per_block, compiled after ")


# whole, with a ladder


def test_safe_compile_tries_the_whole_then_the_blocks(stack: Callable[..., nn.Module], until: Wait) -> None:
    compiled = torchspan.safe_compile(stack(), backend=takes_small_graphs, budget=Budget(seconds=120))
    x = torch.randn(2, 16)
    expected = compiled._orig_mod(x)
    until(lambda: len(compiled.report.attempts) == 2, lambda: compiled(x))
    assert [(a.strategy, a.outcome) for a in compiled.report.attempts] == [("whole", "failed"), ("per_block", "compiled")]
    assert torch.equal(compiled(x), expected)
    assert choices(torchspan.safe_compile(huge(50)))[0] == "whole → per_block → eager"


def test_strategies_in_an_order_of_ones_own() -> None:
    assert choices(torchspan.compile(Deep(2), strategy=["per_block", "whole"]))[0] == "per_block → whole → eager"


# in part


@pytest.mark.parametrize(
    ("chosen", "doubled"),
    [({"max_layers": 2}, 2), ({"layer_indices": [1]}, 1), ({"layer_indices": range(3)}, 3), ({"layer_indices": [-1, 0]}, 2)],
)
def test_partial_compile_compiles_the_chosen_blocks_only(chosen: dict[str, Any], doubled: int, until: Wait) -> None:
    model, x = Deep(4), torch.ones(1, 2)
    compiled = torchspan.partial_compile(model, backend=doubles, verify="off", **chosen)
    with torch.no_grad():
        expected = model(x)
        until(lambda: bool(compiled.report.attempts), lambda: compiled(x))
        torch.testing.assert_close(compiled(x), expected * 2**doubled)
    assert [attempt.region for attempt in compiled.report.attempts] == [f"Layer ×{doubled}"]
    assert "of 4 asked for" in compiled.report.decisions[1].reason


def test_blocks_are_numbered_as_their_list_is_though_one_of_them_is_of_another_kind() -> None:
    model = Deep(4)
    model.layers[0] = nn.Sequential(nn.Linear(2, 2, bias=False))
    reason = torchspan.partial_compile(model, layer_indices=[0, 3]).report.decisions[1].reason
    assert reason == "2 blocks of 4 asked for (0, 3): Sequential ×1, Layer ×1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer_indices": [0, 4, 9]}, r"layer_indices has 4, 9, but there are 4 blocks: expected 0 to 3 \(or -4 to -1"),
        ({"layer_indices": [-5]}, "layer_indices has -5, but there are 4 blocks"),
        ({"layer_indices": []}, "layer_indices is empty; expected numbers of blocks, or None for all"),
        ({"layer_indices": 3}, "layer_indices is 3; expected numbers of blocks, such as"),
        ({"layer_indices": ["0"]}, "layer_indices has '0'; expected numbers of blocks"),
        ({"layer_indices": [True]}, "layer_indices has True; expected numbers of blocks"),
        ({"max_layers": 0}, "max_layers is 0; expected 1 or more, or None for all"),
        ({"max_layers": -2}, "max_layers is -2; expected 1 or more"),
        ({"max_layers": 1.5}, "max_layers is 1.5; expected 1 or more"),
    ],
)
def test_blocks_that_are_not_there_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        torchspan.partial_compile(Deep(4), **arguments)


def test_a_model_without_blocks_is_compiled_whole_with_a_decision_or_refused_if_strict() -> None:
    model = nn.Linear(2, 2)
    compiled = torchspan.partial_compile(model, layer_indices=[0])
    assert choices(compiled) == ["per_block → whole → eager", "not per_block", "whole"]
    assert (
        compiled.report.decisions[1].reason
        == "Linear has no repeated blocks (two modules of the same structure, with submodules)"
    )
    assert choices(torchspan.partial_compile(abs))[1:] == ["not per_block", "whole"]
    assert choices(torchspan.partial_compile(huge(20, repeated=False)))[1:] == ["not per_block", "eager"]
    for program, name in ((model, "Linear"), (abs, "abs")):
        with pytest.raises(InputError, match=rf"{name} has no repeated blocks .* smart_compile chooses by size"):
            torchspan.partial_compile(program, strict=True)


# arguments


def test_torch_compiles_arguments_pass_through_all_three() -> None:
    for make in (torchspan.safe_compile, torchspan.partial_compile, torchspan.smart_compile):
        compiled = make(Deep(2), mode="max-autotune", fullgraph=True, dynamic=True, options={"max_autotune": False})
        settings = compiled._torchspan_plan.settings
        assert (settings.mode, settings.fullgraph, settings.dynamic) == ("max-autotune", True, True)
        assert settings.options == {"fallback_random": True, "max_autotune": False}
        assert make(Deep(2), backend="aot_eager")._torchspan_plan.settings.backend == "aot_eager"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: torchspan.compile(m, strategy="hole"), UnknownNameError, "no strategy 'hole'; did you mean 'whole'"),
        (lambda m: torchspan.compile(m, strategy=["whole", "auto"]), UnknownNameError, "no strategy 'auto'"),
        (lambda m: torchspan.compile(m, strategy=[]), InputError, "strategy is empty"),
        (lambda m: torchspan.compile(m, strategy="whole", max_layers=1), InputError, "max_layers is for strategy='per_block'"),
        (lambda m: torchspan.safe_compile(m, buget=Budget()), UnknownNameError, "no argument 'buget'; did you mean 'budget'"),
        (lambda m: torchspan.safe_compile(m, budget=3), InputError, "budget is 3; expected a Budget"),
        (
            lambda m: torchspan.safe_compile(m, budget=Budget(seconds=0)),
            InputError,
            "budget of 0 seconds; expected more",
        ),
        (lambda m: torchspan.safe_compile(m, budget=Budget(seconds=-1)), InputError, "budget of -1 seconds"),
        (lambda m: torchspan.safe_compile(m, budget=Budget(memory=0)), InputError, "budget of 0 memory; expected more than 0"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_once(make: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(Deep(2))
