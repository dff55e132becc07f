"""Calls that torch.compile would go on compiling: changing numbers and text, alternating states, one call that is odd."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from torchspan.jobs.budget import Budget
from torchspan.regions.generation import Generation
from torchspan.strategies._compile import compile_bounded

Wait = Callable[..., None]
SOON = Budget(seconds=300, memory="6GiB")


def whole(program: Any, **arguments: Any) -> Any:
    return compile_bounded(program, budget=SOON, **{"strategy": "whole", "backend": "eager", **arguments})


def generations(compiled: Any) -> list[Generation]:
    return compiled._torchspan_plan._root._generations.all()


def stages(compiled: Any) -> list[str]:
    return [generation.stage for generation in generations(compiled)]


def is_settled(compiled: Any, count: int) -> bool:
    return stages(compiled).count("swapped") == count and not {"compiling", "ready"} & set(stages(compiled))


def outcomes(compiled: Any) -> list[str]:
    return [attempt.outcome for attempt in compiled.report.attempts]


def runs_compiled(compiled: Any, call: Callable[[], Any]) -> Any:
    """What a call gives, which is to run a compiled graph."""
    before = sum(generation.code.num_calls for generation in generations(compiled) if generation.code is not None)
    outputs = call()
    assert sum(generation.code.num_calls for generation in generations(compiled) if generation.code is not None) > before
    return outputs


# one odd call


class Scaled(nn.Module):
    """Takes, beside its tensor, whatever one likes."""

    def forward(self, x: torch.Tensor, other: Any = None) -> torch.Tensor:
        if isinstance(other, Mapping) and "scale" in other:
            return x * other["scale"]
        return (x * 2).relu()


def test_one_call_that_cannot_be_sent_spoils_only_itself(until: Wait) -> None:
    compiled, x = whole(Scaled()), torch.randn(4)
    assert torch.equal(compiled(x, threading.Lock()), (x * 2).relu())
    until(lambda: is_settled(compiled, 1), lambda: compiled(x))
    assert torch.equal(runs_compiled(compiled, lambda: compiled(x)), (x * 2).relu())
    assert torch.equal(compiled(x, threading.Lock()), (x * 2).relu())
    assert [(attempt.outcome, attempt.where) for attempt in compiled.report.attempts[:1]] == [("failed", "sending the program")]
    assert outcomes(compiled) == ["failed", "compiled"]
    assert any(decision.reason.startswith("calls like this one only: ") for decision in compiled.report.decisions)


def test_one_call_under_vmap_and_one_that_raises_spoil_only_themselves(until: Wait) -> None:
    compiled, x = whole(Scaled()), torch.randn(4)
    assert torch.equal(torch.vmap(compiled)(x[None]), (x[None] * 2).relu())
    assert generations(compiled) == []
    assert any(decision.reason.startswith("inside a transform of torch.func") for decision in compiled.report.decisions)
    with pytest.raises(TypeError):
        compiled(x, {"scale": "text"})
    until(lambda: is_settled(compiled, 1), lambda: compiled(x))
    assert torch.equal(runs_compiled(compiled, lambda: compiled(x)), (x * 2).relu())


def fails_for_three(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    if any(isinstance(input_, torch.Tensor) and input_.shape == (3,) for input_ in inputs):
        raise RuntimeError("no threes")
    return graph.forward


def test_a_signature_that_does_not_compile_spoils_only_itself(until: Wait) -> None:
    compiled, odd, x = whole(Scaled(), backend=fails_for_three, strategy="auto"), torch.randn(3), torch.randn(2, 4)
    until(lambda: len(compiled.report.attempts) == 1, lambda: compiled(odd))
    until(lambda: "compiled" in outcomes(compiled), lambda: compiled(x))
    until(lambda: "swapped" in stages(compiled), lambda: compiled(x))
    assert torch.equal(runs_compiled(compiled, lambda: compiled(x)), (x * 2).relu())
    assert torch.equal(compiled(odd), (odd * 2).relu()) and outcomes(compiled).count("failed") == 1


# several states


class Modal(nn.Module):
    """Its forward goes by an attribute, and by the mode of a module inside."""

    def __init__(self) -> None:
        super().__init__()
        self.mode = "double"
        self.drop = nn.Dropout(1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(x * 2 if self.mode == "double" else x * 3)


@pytest.mark.parametrize("is_inner", [False, True])
def test_states_that_alternate_are_each_compiled_once(is_inner: bool, until: Wait) -> None:
    compiled, x = whole(Modal().eval()), torch.randn(4)

    def both() -> None:
        for number in range(2):
            if is_inner:
                compiled.drop.train(bool(number))
            else:
                compiled.mode = ("double", "triple")[number]
            expected = compiled._orig_mod(x)
            is_last = is_settled(compiled, 2)
            actual = runs_compiled(compiled, lambda: compiled(x)) if is_last else compiled(x)
            assert torch.equal(actual, expected)

    until(lambda: is_settled(compiled, 2), both)
    for _ in range(6):
        both()
    assert outcomes(compiled) == ["compiled", "compiled"] and stages(compiled) == ["swapped", "swapped"]


@pytest.mark.once
def test_the_limit_is_an_option_and_its_decision_says_what_was_compiled(until: Wait) -> None:
    compiled = whole(Scaled(), dynamic=False, wait=True, recompile_limit=2, backend=fails_for_three)
    for length in (3, 4, 5, 6):
        x = torch.randn(length)
        assert torch.equal(compiled(x), (x * 2).relu())
    assert outcomes(compiled) == ["failed", "compiled"]
    assert compiled.report.decisions[-1].reason == (
        "1 of 2 input signatures and states of the program were compiled; calls with others run eagerly (recompile_limit=2)"
    )


# numbers


def cooled(x: torch.Tensor, temperature: float, steps: int = 2) -> torch.Tensor:
    return (x / temperature).softmax(-1) + steps


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_number_that_changes_with_every_call_is_a_symbol(backend: str, until: Wait) -> None:
    compiled, x, count = whole(cooled, backend=backend), torch.randn(4, 8), 0

    def step() -> torch.Tensor:
        nonlocal count
        count += 1
        actual = compiled(x, 0.5 + count / 7, 2 + count)
        torch.testing.assert_close(actual, cooled(x, 0.5 + count / 7, 2 + count))
        return actual

    until(lambda: any(generation.stage == "swapped" and any(generation.dims) for generation in generations(compiled)), step)
    for _ in range(12):
        runs_compiled(compiled, step)
    assert outcomes(compiled) in (["compiled"], ["compiled", "compiled"])
    [reason] = [decision.reason for decision in compiled.report.decisions if decision.choice == "dynamic"]
    assert reason.startswith("numbers differ between calls: a number among the arguments is ")


def test_a_number_that_the_program_branches_on_has_eagers_results(until: Wait) -> None:
    def branched(x: torch.Tensor, limit: float) -> torch.Tensor:
        return x * 2 if limit > 1.0 else x * 3

    compiled, x = whole(branched), torch.randn(4)

    def all_of_them() -> None:
        for limit in (0.25, 0.5, 1.5, -0.0, 0.0, float("nan"), 2.5):
            assert torch.equal(compiled(x, limit), branched(x, limit))

    until(lambda: "swapped" in stages(compiled) and not {"compiling", "ready"} & set(stages(compiled)), all_of_them)
    all_of_them()


# what no guard reads


@pytest.mark.parametrize("is_nested", [True, False])
def test_text_that_the_program_does_not_read_does_not_count(is_nested: bool, until: Wait) -> None:
    def ignoring(batch: dict[str, Any], name: str = "") -> torch.Tensor:
        return batch["x"] * 2

    compiled, x, count = whole(ignoring), torch.randn(4), 0

    def step() -> None:
        nonlocal count
        count += 1
        text = f"sample {count}"
        actual = compiled({"x": x, "name": text}) if is_nested else compiled({"x": x}, text)
        assert torch.equal(actual, x * 2)

    until(lambda: is_settled(compiled, 1), step)
    for _ in range(12):
        runs_compiled(compiled, step)
    assert outcomes(compiled) == ["compiled"]


def test_text_that_the_program_reads_has_an_entry_for_each(until: Wait) -> None:
    def reading(x: torch.Tensor, how: str) -> torch.Tensor:
        return x * 2 if how == "double" else x * 3

    compiled, x = whole(reading), torch.randn(4)

    def both() -> None:
        assert torch.equal(compiled(x, "double"), x * 2) and torch.equal(compiled(x, "triple"), x * 3)

    until(lambda: is_settled(compiled, 2), both)
    for how in ("double", "triple"):
        runs_compiled(compiled, lambda how=how: compiled(x, how))
    assert outcomes(compiled) == ["compiled", "compiled"]
