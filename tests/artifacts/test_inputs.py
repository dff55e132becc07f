"""Example inputs from text."""

from __future__ import annotations

import pytest
import torch

from torchspan.artifacts import parse_inputs
from torchspan.core.errors import InputError


def test_each_part_is_a_tensor_of_that_dtype_and_shape() -> None:
    found = parse_inputs(" float32[4, 10],int64[2] , bool[3],bfloat16[1,2,3],complex64[2],float64")
    assert [str(tensor.dtype).removeprefix("torch.") for tensor in found] == [
        "float32",
        "int64",
        "bool",
        "bfloat16",
        "complex64",
        "float64",
    ]
    assert [tuple(tensor.shape) for tensor in found] == [(4, 10), (2,), (3,), (1, 2, 3), (2,), ()]
    assert set(found[1].tolist()) <= {0, 1}
    assert all(torch.equal(one, two) for one, two in zip(found, parse_inputs("float32[4,10],int64[2]")))


@pytest.mark.parametrize(
    "text", ["", "float32[4", "float32(4)", "float32[4],", "float32[4];int64[2]", "float31[4]", "nn[2]", "float32[-1]"]
)
def test_text_that_is_no_input_is_one_clear_error(text: str) -> None:
    with pytest.raises(InputError, match=r"expected such as"):
        parse_inputs(text)
