"""``torch.nn.functional.scaled_mm`` and ``scaled_grouped_mm``: products of float8 matrices whose scales say what they mean."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from torchspan.backports._base import Backport
from torchspan.core.errors import UnsupportedError

_PLACE = "torch.nn.functional"
_SINCE = "2.10.0"
_T = TypeVar("_T")

# M, K, N: of the product of (M, K) and (K, N)


class _Number(enum.Enum):
    def __int__(self) -> int:
        return int(self.value)

    __index__ = __int__


class ScalingType(_Number):
    """What one number of a tensor of scales is the scale of."""

    TensorWise = 0
    RowWise = 1
    BlockWise1x16 = 2
    BlockWise1x32 = 3
    BlockWise1x128 = 4
    BlockWise128x128 = 5


class SwizzleType(_Number):
    """How a tensor of scales lies in memory."""

    NO_SWIZZLE = 0
    SWIZZLE_32_4_4 = 1


def scaled_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Tensor | list[Tensor],
    scale_recipe_a: ScalingType | list[ScalingType],
    scale_b: Tensor | list[Tensor],
    scale_recipe_b: ScalingType | list[ScalingType],
    swizzle_a: SwizzleType | list[SwizzleType] | None = None,
    swizzle_b: SwizzleType | list[SwizzleType] | None = None,
    bias: Tensor | None = None,
    output_dtype: torch.dtype | None = torch.bfloat16,
    contraction_dim: list[int] | tuple[int, ...] = (),
    use_fast_accum: bool = False,
) -> Tensor:
    """The product of two float8 matrices, each times its scales.

    Args:
        mat_a: ``(M, K)``.
        mat_b: ``(K, N)``; on a GPU each column contiguous.
        scale_a: float32, one number, or ``(M, 1)``.
        scale_recipe_a: which of the two.
        scale_b: float32, one number, or N of them.
        scale_recipe_b: which of the two.
        swizzle_a: none, for these recipes.
        swizzle_b: none, for these recipes.
        bias: ``(N,)``, added to the product.
        output_dtype: None for that of `mat_a`.
        contraction_dim: ``(1, 0)``, or nothing.
        use_fast_accum: faster and less exact sums on a Hopper GPU.

    Returns:
        ``(M, N)``.

    Raises:
        ValueError: shapes or types that do not fit.
        UnsupportedError: a recipe that this torch has no kernel for.
    """
    recipe = _recipe("scaled_mm", scale_recipe_a, scale_recipe_b)
    _check(mat_a, mat_b, bias, contraction_dim, (_listed(swizzle_a), _listed(swizzle_b)))
    (one_a,), (one_b,) = _listed(scale_a), _listed(scale_b)
    num_a, num_b = (1, 1) if recipe is ScalingType.TensorWise else (mat_a.size(0), mat_b.size(1))
    _check_scale("scale_a", one_a, num_a)
    _check_scale("scale_b", one_b, num_b)
    if recipe is ScalingType.RowWise:
        one_a, one_b = one_a.reshape(-1, 1), one_b.reshape(1, -1)
        if mat_a.device.type == "cpu":  # where 2.8 has no kernel, and later ones compute it so too
            product = (mat_a.float() * one_a) @ (mat_b.float() * one_b)
            return (product if bias is None else product + bias).to(output_dtype or mat_a.dtype)
    return torch._scaled_mm(mat_a, mat_b, one_a, one_b, bias=bias, out_dtype=output_dtype, use_fast_accum=use_fast_accum)


def scaled_grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Tensor | list[Tensor],
    scale_recipe_a: ScalingType | list[ScalingType],
    scale_b: Tensor | list[Tensor],
    scale_recipe_b: ScalingType | list[ScalingType],
    swizzle_a: SwizzleType | list[SwizzleType] | None = None,
    swizzle_b: SwizzleType | list[SwizzleType] | None = None,
    bias: Tensor | None = None,
    offs: Tensor | None = None,
    output_dtype: torch.dtype | None = torch.bfloat16,
    contraction_dim: list[int] | tuple[int, ...] = (),
    use_fast_accum: bool = False,
) -> Tensor:
    """The products of groups of float8 matrices, each row of `mat_a` and column of `mat_b` times its scale.

    Args:
        mat_a: ``(M, K)``, cut by `offs`, or ``(G, M, K)``; each row contiguous.
        mat_b: ``(K, N)``, cut by `offs`, or ``(G, K, N)``; each column contiguous.
        scale_a: float32 ``(M,)`` or ``(G, M)``.
        scale_recipe_a: ``ScalingType.RowWise``.
        scale_b: float32 ``(N,)`` or ``(G, N)``.
        scale_recipe_b: ``ScalingType.RowWise``.
        swizzle_a: none, for this recipe.
        swizzle_b: none, for this recipe.
        bias: none: no kernel takes one yet.
        offs: where each group ends, int32 ``(G,)``.
        output_dtype: bfloat16.
        contraction_dim: what is summed over; decided by the shapes.
        use_fast_accum: faster and less exact sums.

    Returns:
        As of ``grouped_mm``.

    Raises:
        NotImplementedError: anything but a GPU; no torch has a kernel elsewhere.
        UnsupportedError: a recipe that this torch has no kernel for.
    """
    recipe = _recipe("scaled_grouped_mm", scale_recipe_a, scale_recipe_b)
    if recipe is not ScalingType.RowWise:
        raise _no_kernel("scaled_grouped_mm", [recipe], [recipe])
    (one_a,), (one_b,) = _listed(scale_a), _listed(scale_b)
    return torch._scaled_grouped_mm(
        mat_a, mat_b, one_a, one_b, offs=offs, bias=bias, out_dtype=output_dtype, use_fast_accum=use_fast_accum
    )


for _public in (ScalingType, SwizzleType, scaled_mm, scaled_grouped_mm):
    _public.__module__ = _PLACE


def _recipe(
    function: str, scale_recipe_a: ScalingType | list[ScalingType], scale_recipe_b: ScalingType | list[ScalingType]
) -> ScalingType:
    """The one recipe of both sides, if it is one that 2.8's kernels know; raises UnsupportedError."""
    recipes_a, recipes_b = _listed(scale_recipe_a), _listed(scale_recipe_b)
    if recipes_a == recipes_b and recipes_a in ([ScalingType.TensorWise], [ScalingType.RowWise]):
        return recipes_a[0]
    raise _no_kernel(function, recipes_a, recipes_b)


def _no_kernel(function: str, recipes_a: Sequence[ScalingType], recipes_b: Sequence[ScalingType]) -> UnsupportedError:
    request = " with ".join("+".join(recipe.name for recipe in recipes) for recipes in (recipes_a, recipes_b))
    known = "RowWise with RowWise" + (", TensorWise with TensorWise" if function == "scaled_mm" else "")
    return UnsupportedError(
        f"{_PLACE}.{function}: torch {torch.__version__} has no kernel for scales {request}, only {known}; torch has more of "
        f"them since {_SINCE}; scale by row here, or dequantize and multiply in bfloat16"
    )


def _listed(value: _T | list[_T] | None) -> list[_T]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _check(
    mat_a: Tensor,
    mat_b: Tensor,
    bias: Tensor | None,
    contraction_dim: Sequence[int],
    swizzles: tuple[list[SwizzleType], list[SwizzleType]],
) -> None:
    for name, mat in (("mat_a", mat_a), ("mat_b", mat_b)):
        if mat.dim() != 2:
            raise ValueError(f"{name} must be a matrix, got {mat.dim()} dimensions")
        if not mat.dtype.is_floating_point or mat.dtype.itemsize != 1:
            raise ValueError(f"Invalid scaling configuration: {name} should be float8, got {mat.dtype}")
    if mat_a.size(1) != mat_b.size(0):
        raise ValueError(f"mat_a and mat_b shapes cannot be multiplied ({_shape(mat_a)} and {_shape(mat_b)})")
    if tuple(dim % 2 for dim in contraction_dim) not in ((), (1, 0)):
        raise ValueError(f"contraction_dim must be (1, 0) or empty, got {tuple(contraction_dim)}")
    if bias is not None and bias.numel() != mat_b.size(1):
        raise ValueError(f"Bias must be size {mat_b.size(1)} but got {bias.numel()}")
    if bias is not None and bias.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"Bias must be float32, bfloat16 or float16, but got {bias.dtype}")
    first = [swizzle[0] for swizzle in swizzles if swizzle]
    if mat_a.device.type == "cpu" and len(first) == 2 and set(first) != {SwizzleType.NO_SWIZZLE}:
        raise ValueError("CPU does not support swizzle.")


def _check_scale(name: str, scale: Tensor, num_scales: int) -> None:
    if scale.dtype != torch.float32 or scale.numel() != num_scales:
        raise ValueError(f"{name} must have {num_scales} float32 elements, got {scale.numel()} of {scale.dtype}")


def _shape(mat: Tensor) -> str:
    return "x".join(map(str, mat.shape))


BACKPORT = Backport(
    name="scaled_mm",
    summary="products of scaled float8 matrices: torch.nn.functional.scaled_mm, scaled_grouped_mm, ScalingType, SwizzleType",
    target=_PLACE,
    since=_SINCE,
    first_forms={"2.10, 2.11": "no kernel for a CPU", "2.12": "its kinds of scaling cannot be traced"},
    upstream="https://github.com/pytorch/pytorch/pull/163856",
    differs=(
        "scales by tensor and by row only: those of blocks raise UnsupportedError, as 2.8's kernels do not know them; "
        "the types are Python's enumerations"
    ),
    names={
        "ScalingType": lambda: ScalingType,
        "SwizzleType": lambda: SwizzleType,
        "scaled_mm": lambda: scaled_mm,
        "scaled_grouped_mm": lambda: scaled_grouped_mm,
    },
)
