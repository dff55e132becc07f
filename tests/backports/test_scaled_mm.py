"""scaled_mm: float8 products with scales by tensor and by row equal those of the matrices that they stand for."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.core.errors import UnsupportedError

pytestmark = [
    pytest.mark.usefixtures("environment"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),  # dynamo's imports, from 2.13 on
]

OURS = is_lacking(REGISTRY.get("scaled_mm").BACKPORT)
RECIPES = ["TensorWise", "RowWise"]
OUTPUTS = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def quantized(rows: int, columns: int, recipe: str, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """A float8 matrix and its scales: one, or ``(rows, 1)``."""
    values = torch.randn(rows, columns)
    peak = values.abs().amax(1, keepdim=True) if recipe == "RowWise" else values.abs().amax()
    scale = peak / torch.finfo(dtype).max
    return (values / scale).to(dtype), scale


def operands(recipe: str, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(16, 32)``, ``(32, 48)`` and their scales."""
    (mat_a, scale_a), (mat_b, scale_b) = quantized(16, 32, recipe, dtype), quantized(48, 32, recipe)
    return mat_a, mat_b.t(), scale_a, scale_b.t()


def multiply(recipe: str, mats: tuple[Tensor, Tensor, Tensor, Tensor], **named: Any) -> Tensor:
    mat_a, mat_b, scale_a, scale_b = mats
    scaling = getattr(F.ScalingType, recipe)
    return F.scaled_mm(mat_a, mat_b, scale_a, scaling, scale_b, scaling, **named)


def expected(mats: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    mat_a, mat_b, scale_a, scale_b = mats
    return (mat_a.float() * scale_a) @ (mat_b.float() * scale_b)


@pytest.mark.parametrize("output_dtype", OUTPUTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_product_is_that_of_the_matrices_times_their_scales(recipe: str, output_dtype: torch.dtype) -> None:
    mats = operands(recipe)
    actual = multiply(recipe, mats, output_dtype=output_dtype)
    assert actual.dtype == output_dtype
    tolerance = TOLERANCE[output_dtype]
    torch.testing.assert_close(actual.float(), expected(mats), rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("recipe", RECIPES)
def test_without_an_output_dtype_it_is_bfloat16_and_none_is_that_of_the_first_factor(recipe: str) -> None:
    mats = operands(recipe)
    assert multiply(recipe, mats).dtype == torch.bfloat16
    actual = multiply(recipe, mats, output_dtype=None)
    assert actual.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(actual.float(), expected(mats), rtol=0.13, atol=0.05)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_bias_is_added(recipe: str) -> None:
    mats, bias = operands(recipe), torch.randn(48)
    actual = multiply(recipe, mats, bias=bias, output_dtype=torch.float32)
    torch.testing.assert_close(actual, expected(mats) + bias, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_wide_float8_and_lists_of_one_and_a_spelt_out_contraction_are_taken(recipe: str) -> None:
    mat_a, mat_b, scale_a, scale_b = operands(recipe, torch.float8_e5m2)
    scaling = getattr(F.ScalingType, recipe)
    none = F.SwizzleType.NO_SWIZZLE
    for dims in ((1, 0), [-1, -2], ()):
        actual = F.scaled_mm(
            mat_a, mat_b, [scale_a], [scaling], [scale_b], [scaling], [none], none, None, torch.float32, dims, True
        )
        torch.testing.assert_close(actual, expected((mat_a, mat_b, scale_a, scale_b)), rtol=1e-5, atol=1e-4)


def test_it_compiles_in_one_graph() -> None:
    mats = operands("RowWise")
    compiled = torch.compile(lambda mats: multiply("RowWise", mats), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(mats).float(), expected(mats), rtol=1e-2, atol=1e-1)


def changed(place: int, value: Any) -> tuple[Any, ...]:
    mats = list(operands("TensorWise"))
    mats[place] = value
    return tuple(mats)


ONES = torch.ones(16, 32).to(torch.float8_e4m3fn)
REFUSED = {
    "three dimensions": (changed(0, ONES[None]), {}, "mat_a must be a matrix"),
    "sizes": (changed(0, ONES[:, :16]), {}, r"shapes cannot be multiplied \(16x16 and 32x48\)"),
    "bias": (operands("TensorWise"), {"bias": torch.ones(7)}, "Bias must be size 48 but got 7"),
    "type of the bias": (operands("TensorWise"), {"bias": torch.ones(48).double()}, "Bias must be [Ff]loat32"),
    "type": (changed(0, ONES.bfloat16()), {}, "float8|fp8"),
    "scales": (changed(2, torch.ones(2)), {}, "scale_a must have 1 [Ff]loat"),
    "type of the scale": (changed(2, torch.tensor(1.0).double()), {}, "scale|scaling"),
    "contraction": (operands("TensorWise"), {"contraction_dim": (0, 1)}, "contraction"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_an_error_that_says_so(case: str) -> None:
    mats, named, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        multiply("TensorWise", mats, **named)


def test_a_row_without_a_scale_is_an_error() -> None:
    mat_a, mat_b, scale_a, scale_b = operands("RowWise")
    with pytest.raises(ValueError, match="scale_a must have"):
        multiply("RowWise", (mat_a, mat_b, scale_a[1:], scale_b))


def test_a_cpu_takes_no_swizzled_scales() -> None:
    swizzle = F.SwizzleType.SWIZZLE_32_4_4
    with pytest.raises(ValueError, match="CPU does not support swizzle"):
        multiply("TensorWise", operands("TensorWise"), swizzle_a=swizzle, swizzle_b=swizzle)


@pytest.mark.skipif(not OURS, reason="torch's own has kernels for blocks, on some GPUs")
def test_scales_of_blocks_are_refused_with_the_recipe_the_release_and_the_way_out() -> None:
    mat_a, mat_b, *_ = operands("TensorWise")
    scales, block = torch.ones(16, 1), F.ScalingType.BlockWise1x128
    with pytest.raises(UnsupportedError, match=r"BlockWise1x128 with BlockWise128x128.*2\.10\.0; scale by row here"):
        F.scaled_mm(mat_a, mat_b, scales, block, scales, F.ScalingType.BlockWise128x128)
    with pytest.raises(UnsupportedError, match=r"scaled_grouped_mm.*only RowWise with RowWise"):
        F.scaled_grouped_mm(mat_a, mat_b, scales, block, scales, block)
    with pytest.raises(UnsupportedError, match=r"scaled_grouped_mm.*only RowWise with RowWise"):
        F.scaled_grouped_mm(mat_a, mat_b, scales, F.ScalingType.TensorWise, scales, F.ScalingType.TensorWise)


@pytest.mark.skipif(not OURS, reason="torch 2.15 checks the shapes first")
def test_groups_need_a_gpu() -> None:
    mat_a, mat_b = ONES, torch.ones(2, 16, 32).to(torch.float8_e4m3fn).transpose(1, 2)
    row, ends = F.ScalingType.RowWise, torch.tensor([8, 16], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="'CPU' backend"):
        F.scaled_grouped_mm(mat_a, mat_b, torch.ones(16), row, torch.ones(2, 16), row, offs=ends)


def test_the_recipes_are_numbered_named_and_survive_a_copy() -> None:
    names = ["TensorWise", "RowWise", "BlockWise1x16", "BlockWise1x32", "BlockWise1x128", "BlockWise128x128"]
    assert list(F.ScalingType.__members__) == names
    assert list(F.SwizzleType.__members__)[:2] == ["NO_SWIZZLE", "SWIZZLE_32_4_4"]
    for number, name in enumerate(names):
        kind = F.ScalingType.__members__[name]
        assert (kind.name, kind.value, int(kind)) == (name, number, number)
        assert F.ScalingType(number) == kind != number
        assert copy.deepcopy({kind: 1}) == {kind: 1}
    assert F.ScalingType.__module__ == F.scaled_mm.__module__ == "torch.nn.functional"


def test_the_signatures_are_torchs() -> None:
    first = "mat_a mat_b scale_a scale_recipe_a scale_b scale_recipe_b swizzle_a swizzle_b bias"
    last = "output_dtype contraction_dim use_fast_accum"
    assert list(inspect.signature(F.scaled_mm).parameters) == f"{first} {last}".split()
    assert list(inspect.signature(F.scaled_grouped_mm).parameters) == f"{first} offs {last}".split()
