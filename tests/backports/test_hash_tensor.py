"""hash_tensor's numbers are torch 2.15's, of every type, shape and dimension."""

from __future__ import annotations

import functools
import operator
import struct

import pytest
import torch

pytestmark = pytest.mark.usefixtures("environment")


def bits(value: float | int) -> int:
    return int.from_bytes(struct.pack("<d" if isinstance(value, float) else "<q", value), "little")


def expected(x: torch.Tensor) -> int:
    return functools.reduce(operator.xor, (bits(value) for value in x.flatten().tolist()), 0)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.uint8, torch.int32]
)
def test_the_numbers_are_the_exclusive_or_of_64_bits(dtype: torch.dtype) -> None:
    x = (torch.arange(15) * 7 - (0 if dtype == torch.uint8 else 40)).to(dtype).reshape(3, 5)
    whole = torch.hash_tensor(x)
    assert (whole.dtype, whole.shape, whole.item()) == (torch.uint64, (), expected(x))
    assert x.hash_tensor().item() == whole.item()
    rows = torch.hash_tensor(x, 1)
    assert rows.tolist() == [expected(row) for row in x]
    assert torch.hash_tensor(x, dim=-2, keepdim=True).shape == (1, 5)
    assert torch.hash_tensor(x, 0).tolist() == [expected(column) for column in x.T]
    assert torch.hash_tensor(x, (0, 1)).item() == whole.item()


def test_numbers_without_dimensions_and_without_elements() -> None:
    assert torch.hash_tensor(torch.tensor(3)).item() == 3
    assert torch.hash_tensor(torch.tensor(3), 0, keepdim=True).shape == ()
    assert torch.hash_tensor(torch.ones(0, 3), 1).tolist() == []
    assert torch.hash_tensor(torch.tensor([torch.nan, -0.0])).item() == bits(torch.nan) ^ bits(-0.0)


@pytest.mark.parametrize(
    ("shape", "keywords", "error"),
    [
        ((0,), {}, RuntimeError),
        ((0, 3), {"dim": 0}, IndexError),
        ((2,), {"mode": 1}, RuntimeError),
        ((2,), {"dim": 5}, IndexError),
        ((2, 2), {"dim": (0, 0)}, RuntimeError),
    ],
    ids=str,
)
def test_what_has_no_hash_is_an_error(shape: tuple[int, ...], keywords: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        torch.hash_tensor(torch.ones(shape), **keywords)
