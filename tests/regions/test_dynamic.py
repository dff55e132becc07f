"""Dynamic shapes: decided after the second size of an input, compiled in a child like everything, served by one code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from torchspan.core.numerics import difference
from torchspan.jobs.budget import Budget
from torchspan.strategies._compile import compile_bounded

SOON = Budget(seconds=120, memory="4GiB")
Wait = Callable[..., None]


def choices(compiled: Any) -> list[str]:
    return [decision.choice for decision in compiled.report.decisions]


def outcomes(compiled: Any) -> list[str]:
    return [attempt.outcome for attempt in compiled.report.attempts]


def test_the_second_size_is_compiled_for_all_sizes_and_training_agrees_with_eager(stack: Any, until: Wait) -> None:
    eager = stack(num_blocks=2)
    compiled = compile_bounded(stack(num_blocks=2), strategy="whole", budget=SOON)
    for count, rows in ((1, 4), (2, 6)):
        x = torch.randn(rows, 5, 16)
        until(lambda count=count: len(compiled.report.attempts) == count, lambda x=x: compiled(x))
    until(lambda: compiled._torchspan_plan._root._generations.all()[-1].stage == "swapped", lambda: compiled(x))
    [decision] = [decision for decision in compiled.report.decisions if decision.choice == "dynamic"]
    assert decision.reason == "sizes differ between calls: tensor 0 of the inputs is 4×5×16 and 6×5×16"
    for rows in (2, 3, 9, 30):
        x = torch.randn(rows, 5, 16)
        expected, actual = eager(x), compiled(x)
        assert difference(actual, expected) is None
        eager.zero_grad()
        compiled.zero_grad()
        expected.sum().backward()
        actual.sum().backward()
        pairs = zip(compiled.parameters(), eager.parameters(), strict=True)
        assert all(difference(parameter.grad, other.grad) is None for parameter, other in pairs)
    assert outcomes(compiled) == ["compiled", "compiled"]
    assert compiled._torchspan_plan._root._generations.all()[-1].code.num_calls >= 4
    assert not hasattr(x, "_dynamo_dynamic_indices")


def test_a_second_dimension_that_varies_is_made_dynamic_too(until: Wait) -> None:
    compiled = compile_bounded(lambda x: (x * 2).relu().sum(-1), strategy="whole", backend="eager", budget=SOON)
    for count, shape in ((1, (4, 8)), (2, (6, 8)), (3, (4, 10))):
        x = torch.randn(shape)
        until(lambda count=count: outcomes(compiled).count("compiled") == count, lambda x=x: compiled(x))
    for shape in ((4, 8), (9, 8), (9, 20)):
        x = torch.randn(shape)
        assert difference(compiled(x), (x * 2).relu().sum(-1)) is None
    assert len(compiled.report.attempts) == 3
    assert choices(compiled).count("dynamic") == 2


def test_what_is_one_size_only_to_the_program_is_compiled_by_itself(until: Wait) -> None:
    def by_size(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] == 6 else x * 3

    compiled = compile_bounded(by_size, strategy="whole", backend="eager", budget=SOON)
    for rows in (4, 6, 7):
        x = torch.randn(rows, 8)
        expected = by_size(x)
        for _ in range(2):
            known = len(compiled.report.attempts)
            assert torch.equal(compiled(x), expected)
            until(lambda known=known: len(compiled.report.attempts) > known or not compiling(compiled))
    assert "static" in choices(compiled)
    x = torch.randn(6, 8)
    assert torch.equal(compiled(x), x * 2)


def compiling(compiled: Any) -> bool:
    return any(generation.stage == "compiling" for generation in compiled._torchspan_plan._root._generations.all())


@pytest.mark.once
def test_static_shapes_stay_static_if_asked_for_and_dynamic_ones_are_so_from_the_first_call() -> None:
    static = compile_bounded(torch.sin, strategy="whole", backend="eager", budget=SOON, dynamic=False, wait=True)
    dynamic = compile_bounded(torch.sin, strategy="whole", backend="eager", budget=SOON, dynamic=True, wait=True)
    for length in (4, 6, 9):
        x = torch.randn(length)
        assert difference(static(x), torch.sin(x)) is None
        assert difference(dynamic(x), torch.sin(x)) is None
    assert outcomes(static) == ["compiled"] * 3
    assert outcomes(dynamic) == ["compiled"]
    assert "dynamic" not in choices(static) + choices(dynamic)


@pytest.mark.once
def test_more_signatures_than_the_limit_run_eagerly_with_one_decision() -> None:
    compiled = compile_bounded(torch.sin, strategy="whole", backend="eager", budget=SOON, dynamic=False, wait=True)
    for length in range(2, 14):
        x = torch.randn(length)
        assert torch.equal(compiled(x), torch.sin(x))
    assert len(compiled.report.attempts) == 8
    assert [decision.reason for decision in compiled.report.decisions].count(
        "8 input signatures and states of the program were compiled; calls with others run eagerly (recompile_limit=8)"
    ) == 1
