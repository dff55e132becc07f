"""The one place of tolerances: what counts as the same result."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from torchspan.core.numerics import EXACT, TOLERANCES, difference, tensors, tolerance

Pair = namedtuple("Pair", "first second")


@dataclass
class Output:
    loss: torch.Tensor
    note: str = "a"


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_an_error_of_rounding_passes_and_one_of_a_hundredth_more_than_allowed_does_not(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    expected = torch.randn(1000, dtype=torch.float64).to(dtype)
    allowed = tolerance(dtype).relative
    assert difference(expected.clone(), expected) is None
    wide = expected.to(torch.complex128 if dtype.is_complex else torch.float64)
    assert difference((wide * (1 + allowed / 2)).to(dtype), expected) is None
    assert difference((wide + 4 * allowed).to(dtype), expected) is not None


def test_integers_and_flags_are_exact() -> None:
    assert tolerance(torch.int64) == EXACT
    assert difference(torch.tensor([1, 2, 4]), torch.tensor([1, 2, 3])) == "output: 1 of 3 elements differ"
    assert difference(torch.tensor([True]), torch.tensor([True])) is None


def test_a_computation_through_a_low_precision_is_as_wide_as_that() -> None:
    expected = torch.ones(4)
    actual = expected * 1.01
    assert difference(actual, expected) is not None
    assert difference(actual, expected, torch.bfloat16) is None


def test_nan_and_infinity_must_be_where_eager_has_them() -> None:
    expected = torch.tensor([float("nan"), float("inf"), 1.0])
    assert difference(expected.clone(), expected) is None
    assert difference(torch.tensor([0.0, float("inf"), 1.0]), expected) is not None
    assert difference(torch.tensor([float("nan"), float("inf"), float("nan")]), expected) is not None
    assert difference(torch.tensor([float("nan"), -float("inf"), 1.0]), expected) is not None


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        (torch.ones(2), torch.ones(3), "output: shape (2,) instead of (3,)"),
        (torch.ones(2), torch.ones(2).double(), "output: dtype torch.float32 instead of torch.float64"),
        ([torch.ones(2)], (torch.ones(2),), "output: list instead of tuple"),
        ({"a": 1}, {"a": 1, "b": 2}, "output: 1 parts instead of 2"),
        ({"a": torch.zeros(1)}, {"a": torch.ones(1)}, "output['a']: 1 of 1 elements differ"),
        (Pair(1, torch.ones(1)), Pair(1, torch.zeros(1)), "output[1]: 1 of 1"),
        (Output(torch.ones(1), "b"), Output(torch.ones(1), "a"), "output.note: 'b' instead of 'a'"),
        (2.0, 3.0, "output: 2.0 instead of 3.0"),
        (None, torch.ones(1), "output: NoneType instead of a tensor"),
        (torch.ones(1), None, "output: Tensor instead of NoneType"),
    ],
)
def test_a_difference_is_said_with_its_place(actual: Any, expected: Any, message: str) -> None:
    result = difference(actual, expected)
    assert result is not None and result.startswith(message.replace("NoneType instead of a tensor", "NoneType instead of"))


def test_tensors_are_found_in_order() -> None:
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    assert [tensor.numel() for tensor in tensors({"x": [a, Pair(b, 1)], "y": Output(c)})] == [1, 2, 3]
