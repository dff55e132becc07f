"""grouped_mm: a matrix product a group, with the values and gradients of plain products, in every combination of 2d and 3d."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytestmark = [
    pytest.mark.usefixtures("environment"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),  # dynamo's imports, from 2.13 on
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SHAPES = {
    "2d3d": ((24, 16), (3, 16, 8)),
    "3d2d": ((3, 8, 16), (16, 24)),
    "2d2d": ((8, 24), (24, 16)),
    "3d3d": ((3, 8, 16),) * 2,
}
ENDS = {"all": [8, 16, 24], "an empty group": [8, 8, 24], "a first group of none": [0, 16, 24]}


def factors(case: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Both factors of a case, with gradients."""
    shape_a, shape_b = SHAPES[case]
    mat_b = torch.randn(shape_b, dtype=dtype)
    if case == "3d3d":
        mat_b = mat_b.transpose(1, 2)
    return torch.randn(shape_a, dtype=dtype).requires_grad_(), mat_b.detach().requires_grad_()


def offsets(ends: list[int]) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32)


def expected(mat_a: Tensor, mat_b: Tensor, ends: list[int]) -> Tensor:
    """The product, by plain products."""
    if mat_a.dim() == mat_b.dim() == 3:
        return mat_a @ mat_b
    groups = list(enumerate(slice(*pair) for pair in pairwise([0, *ends])))
    if mat_a.dim() == mat_b.dim():
        return torch.stack([mat_a[:, at] @ mat_b[at] for _, at in groups])
    if mat_b.dim() == 3:
        return torch.cat([mat_a[at] @ mat_b[group] for group, at in groups])
    return torch.cat([mat_a[group] @ mat_b[:, at] for group, at in groups], dim=1)


def close(actual: Any, wanted: Any, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual, wanted, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SHAPES)
def test_the_product_and_both_gradients_are_those_of_plain_products(case: str, dtype: torch.dtype, ends: str) -> None:
    mat_a, mat_b = factors(case, dtype)
    offs = None if case == "3d3d" else offsets(ENDS[ends])
    actual = F.grouped_mm(mat_a, mat_b, offs=offs)
    reference = expected(mat_a, mat_b, ENDS[ends])
    assert actual.dtype == dtype
    close(actual, reference, dtype)
    grad = torch.randn(actual.shape, dtype=dtype)
    close(torch.autograd.grad(actual, (mat_a, mat_b), grad), torch.autograd.grad(reference, (mat_a, mat_b), grad), dtype)


def test_only_one_factor_needs_a_gradient() -> None:
    mat_a, mat_b = factors("2d3d")
    result = F.grouped_mm(mat_a.detach(), mat_b, offs=offsets([8, 16, 24]))
    result.backward(torch.ones(result.shape))
    assert mat_a.grad is None
    close(mat_b.grad, mat_a.detach().view(3, 8, 16).sum(1)[:, :, None].expand(3, 16, 8), torch.float32)


def test_weights_of_linear_layers_are_taken_transposed_and_rows_of_the_product_begin_at_16_bytes() -> None:
    tokens, weights = torch.randn(24, 16), torch.randn(3, 6, 16)
    actual = F.grouped_mm(tokens, weights.transpose(-2, -1), offs=offsets([8, 16, 24]))
    assert actual.shape == (24, 6)
    assert actual.stride() == (8, 1)
    close(actual, expected(tokens, weights.transpose(-2, -1), [8, 16, 24]), torch.float32)


def test_rows_behind_the_last_group_are_left_out() -> None:
    mat_a, mat_b = factors("2d3d")
    actual = F.grouped_mm(mat_a, mat_b, offs=offsets([4, 8, 12]))
    assert actual.shape == (24, 8)
    close(actual[:12], expected(mat_a, mat_b, [4, 8, 12]), torch.float32)


def test_it_compiles_in_one_graph_with_its_gradients() -> None:
    mat_a, mat_b = factors("2d3d", torch.bfloat16)
    compiled = torch.compile(lambda a, b, offs: F.grouped_mm(a, b, offs=offs) * 2, fullgraph=True, backend="aot_eager")
    for ends in ([8, 16, 24], [4, 20, 24]):
        actual = compiled(mat_a, mat_b, offsets(ends))
        reference = expected(mat_a, mat_b, ends) * 2
        close(actual, reference, torch.bfloat16)
        grad = torch.randn(actual.shape, dtype=torch.bfloat16)
        actual, reference = (torch.autograd.grad(out, (mat_a, mat_b), grad) for out in (actual, reference))
        close(actual, reference, torch.bfloat16)


def test_a_mixture_of_experts_trains_as_with_a_loop_over_the_experts() -> None:
    tokens, weights = torch.randn(32, 16), torch.randn(4, 8, 16).requires_grad_()
    expert = torch.randint(0, 4, (32,))
    order = expert.argsort(stable=True)
    ends = expert.bincount(minlength=4).cumsum(0).int()
    actual = F.grouped_mm(tokens[order], weights.transpose(-2, -1), offs=ends).square().mean()
    expected = torch.stack([weights[index] @ token for index, token in zip(expert.tolist(), tokens)]).square().mean()
    close(actual, expected, torch.float32)
    close(torch.autograd.grad(actual, weights), torch.autograd.grad(expected, weights), torch.float32)


def mats(shape_a: tuple[int, ...], shape_b: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(shape_a).to(dtype), torch.randn(shape_b).to(dtype)


REFUSED = {
    "strides": (mats((16, 8), (2, 8, 6)), {"offs": offsets([8, 16])}, "strides should be multiple of 16 bytes"),
    "double": (mats((16, 8), (2, 8, 8), torch.float64), {"offs": offsets([8, 16])}, "Expected mat_a to be [Ff]loat32, [Bb]"),
    "one dimension": (mats((8,), (2, 8, 8)), {"offs": offsets([8, 16])}, "mat_a has to be 2 or 3d"),
    "contraction": (mats((16, 12), (2, 8, 8)), {"offs": offsets([8, 16])}, "contraction dimension of mat_a and mat_b"),
    "no offsets": (mats((16, 8), (2, 8, 8)), {}, "Have to provide offsets if there is a 2d matrix"),
    "offsets": (mats((2, 8, 8), (2, 8, 8)), {"offs": offsets([8, 16])}, "or no offset if both matrices are 3d"),
    "groups": (mats((16, 8), (2, 8, 8)), {"offs": offsets([8, 12, 16])}, "matrix batch sizes have to match"),
    "batches": (mats((3, 8, 8), (2, 8, 8)), {}, "batched dimension"),
    "long offsets": (mats((16, 8), (2, 8, 8)), {"offs": offsets([8, 16]).long()}, "Offsets have to be int32"),
    "2d offsets": (mats((16, 8), (2, 8, 8)), {"offs": offsets([8, 16])[None]}, "offs has to be 1D"),
    "bias": (mats((16, 8), (2, 8, 8)), {"offs": offsets([8, 16]), "bias": torch.ones(8)}, "Bias not supported yet"),
    "out_dtype": (mats((16, 8), (2, 8, 8)), {"offs": offsets([8, 16]), "out_dtype": torch.half}, "output dtype must match"),
    "types": ((torch.randn(16, 8).half(), torch.randn(2, 8, 8)), {"offs": offsets([8, 16])}, "same dtype"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_an_error_that_says_so(case: str) -> None:
    args, named, message = REFUSED[case]
    with pytest.raises(RuntimeError, match=message):
        F.grouped_mm(*args, **named)
