"""Example inputs from text, and what is given that is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchspan.artifacts import load, parse_inputs, precompile
from torchspan.core.errors import InputError


def test_each_part_is_a_tensor_of_that_dtype_and_shape() -> None:
    result = parse_inputs(" float32[4, 10],int64[2] , bool[3],bfloat16[1,2,3],complex64[2],float64")
    assert [str(tensor.dtype).removeprefix("torch.") for tensor in result] == [
        "float32",
        "int64",
        "bool",
        "bfloat16",
        "complex64",
        "float64",
    ]
    assert [tuple(tensor.shape) for tensor in result] == [(4, 10), (2,), (3,), (1, 2, 3), (2,), ()]
    assert set(result[1].tolist()) <= {0, 1}
    assert all(torch.equal(actual, two) for actual, two in zip(result, parse_inputs("float32[4,10],int64[2]")))


@pytest.mark.parametrize(
    "text", ["", "float32[4", "float32(4)", "float32[4],", "float32[4];int64[2]", "float31[4]", "nn[2]", "float32[-1]"]
)
def test_text_that_is_no_input_is_one_clear_error(text: str) -> None:
    with pytest.raises(InputError, match=r"expected such as"):
        parse_inputs(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kwargs": [1]}, "example keyword inputs are a mapping by name, not list"),
        ({"passes": 5}, "a pass is a Pass or a function of a GraphModule, not a int"),
    ],
)
def test_what_is_no_program_and_no_pass_is_said(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        precompile(torch.nn.Linear(2, 3), (torch.ones(1, 2),), **arguments)


def test_an_artifact_is_saved_to_a_path_or_into_an_open_file_only() -> None:
    artifact = precompile(torch.nn.Linear(2, 3), (torch.ones(1, 2),), compiler="eager")
    with pytest.raises(InputError, match="to a path or into an open file, not into a int"):
        artifact.save(5)  # type: ignore[call-overload]
    with pytest.raises(InputError, match="from a path or an open file, not from a int"):
        load(5, torch.nn.Linear(2, 3))  # type: ignore[arg-type]
