"""``torch.nn.functional.grouped_mm``: a matrix product for each group of rows or columns, as in a mixture of experts."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from torchspan.backports._base import Backport

# G: groups, M: rows, K: what is summed over, N: columns
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT_BYTES = 16
# torch 2.9 brought it: for every device, and all types
_HAS_GENERAL_KERNEL = torch.ops.aten._grouped_mm.default.has_kernel_for_dispatch_key("CompositeExplicitAutograd")  # type: ignore[arg-type]


def grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The matrix products of groups of different sizes.

    Args:
        mat_a: ``(M, K)``, cut by `offs`, or ``(G, M, K)``.
        mat_b: ``(K, N)``, cut by `offs`, or ``(G, K, N)``.
        offs: where each group ends, int32 ``(G,)``: along M where only `mat_a` is a matrix, along N where only `mat_b` is,
            along K where both are; None where neither is.
        bias: none: no torch takes one yet.
        out_dtype: that of `mat_a`: no torch takes another yet.

    Returns:
        ``(M, N)`` where one is a matrix, else ``(G, M, N)``; each row begins at a multiple of 16 bytes.

    Raises:
        RuntimeError: shapes, strides or types that do not fit.
    """
    if _is_native(mat_a, mat_b):
        return torch._grouped_mm(mat_a, mat_b, offs=offs, bias=bias, out_dtype=out_dtype)
    _check(mat_a, mat_b, offs, bias, out_dtype)
    product: Tensor = torch.ops.torchspan.grouped_mm(mat_a, mat_b, offs)
    return product


grouped_mm.__module__ = "torch.nn.functional"


def _is_native(*mats: Tensor) -> bool:
    """Whether this torch's own operator takes them: on a Hopper GPU, and subclasses such as quantized weights."""
    if _HAS_GENERAL_KERNEL or any(hasattr(type(mat), "__tensor_flatten__") for mat in mats):
        return True
    if not mats[0].is_cuda or any(mat.dtype != torch.bfloat16 for mat in mats):
        return False
    return torch.cuda.get_device_capability(mats[0].device)[0] == 9


def _check(mat_a: Tensor, mat_b: Tensor, offs: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype | None) -> None:
    for name, mat in (("mat_a", mat_a), ("mat_b", mat_b)):
        _require(mat.dtype in _DTYPES, f"Expected {name} to be float32, bfloat16 or float16 matrix, got {mat.dtype}")
    for name, mat in (("mat_a", mat_a), ("mat_b", mat_b)):
        _require(mat.dim() in (2, 3), f"{name} has to be 2 or 3d, got {mat.dim()} dimensions")
    if mat_a.dim() == 3 or mat_b.dim() == 3:
        sizes = f"got {mat_a.size(-1)} and {mat_b.size(-2)}"
        _require(mat_a.size(-1) == mat_b.size(-2), f"contraction dimension of mat_a and mat_b must match, {sizes}")
    for name, mat in (("mat_a", mat_a), ("mat_b", mat_b)):
        _check_strides(name, mat)
    _require(
        (offs is not None) == (2 in (mat_a.dim(), mat_b.dim())),
        "Have to provide offsets if there is a 2d matrix, or no offset if both matrices are 3d",
    )
    if offs is not None:
        _require(offs.dim() == 1, f"offs has to be 1D, got {offs.dim()} dimensions")
        _require(offs.dtype == torch.int32, f"Offsets have to be int32, got {offs.dtype}")
    groups = {len(mat) for mat in (mat_a, mat_b) if mat.dim() == 3} | ({len(offs)} if offs is not None else set())
    _require(len(groups) == 1, f"batched dimension and matrix batch sizes have to match, got {sorted(groups)} groups")
    _require(bias is None, "Bias not supported yet")
    _require(out_dtype in (None, mat_a.dtype), f"Grouped gemm output dtype must match `mat_a` dtype, got {out_dtype}")


def _check_strides(name: str, mat: Tensor) -> None:
    rows, columns = mat.shape[-2:]
    row_stride, column_stride = mat.stride()[-2:]
    if row_stride == 1 and column_stride >= max(1, rows):
        leading = column_stride
    elif column_stride == 1 and row_stride >= max(1, columns):
        leading = row_stride
    else:
        raise RuntimeError(f"Invalid strides/sizes of {name}, got {mat.stride()} for strides and {mat.shape} for sizes")
    aligned = leading * mat.element_size() % _ALIGNMENT_BYTES == 0
    _require(aligned, f"strides should be multiple of {_ALIGNMENT_BYTES} bytes, got {mat.stride()} for {name}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(message)


# the operator; the dispatcher keeps it once it is there, also after the backport is taken back


@functools.cache
def _define_operator() -> None:
    define: Any = torch.library.custom_op
    schema = "(Tensor mat_a, Tensor mat_b, Tensor? offs) -> Tensor"
    operator = define("torchspan::grouped_mm", _forward, mutates_args=(), schema=schema)
    operator.register_fake(_empty_product)
    operator.register_autograd(_gradients, setup_context=_keep_for_backward)


def _forward(mat_a: Tensor, mat_b: Tensor, offs: Tensor | None) -> Tensor:
    product = _empty_product(mat_a, mat_b, offs)
    if offs is None:
        return torch.bmm(mat_a, mat_b, out=product)
    product.zero_()  # what no group writes to
    for group_a, group_b, group_product in _groups(mat_a, mat_b, product, offs):
        torch.mm(group_a, group_b, out=group_product)
    return product


def _groups(mat_a: Tensor, mat_b: Tensor, product: Tensor, offs: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The two factors and the place of the product, of each group."""
    for group, (begin, end) in enumerate(pairwise([0, *offs.tolist()])):
        at = slice(begin, end)
        if mat_a.dim() == 3:
            yield mat_a[group], mat_b[:, at], product[:, at]
        elif mat_b.dim() == 3:
            yield mat_a[at], mat_b[group], product[at]
        else:
            yield mat_a[:, at], mat_b[at], product[group]


def _empty_product(mat_a: Tensor, mat_b: Tensor, offs: Tensor | None) -> Tensor:
    """Room for the product, each row at a multiple of 16 bytes, so that it can be a factor itself."""
    rows, columns = mat_a.size(-2), mat_b.size(-1)
    step = _ALIGNMENT_BYTES // mat_a.element_size()
    row_stride = (columns + step - 1) // step * step
    if mat_a.dim() != mat_b.dim():
        return mat_a.new_empty_strided((rows, columns), (row_stride, 1))
    num_groups = mat_a.size(0) if offs is None else offs.size(0)
    return mat_a.new_empty_strided((num_groups, rows, columns), (rows * row_stride, row_stride, 1))


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    """Both are grouped products themselves: what was summed over is cut now, or the other way round."""
    mat_a, mat_b, offs = ctx.saved_tensors
    product = torch.ops.torchspan.grouped_mm
    grad_a = product(grad, mat_b.transpose(-2, -1), offs) if ctx.needs_input_grad[0] else None
    grad_b = product(mat_a.transpose(-2, -1), grad, offs) if ctx.needs_input_grad[1] else None
    return grad_a, grad_b, None


def _build() -> object:
    _define_operator()
    return grouped_mm


BACKPORT = Backport(
    name="grouped_mm",
    summary="matrix products of groups of different sizes: torch.nn.functional.grouped_mm",
    target="torch.nn.functional",
    since="2.10.0",
    upstream="https://github.com/pytorch/pytorch/pull/168298",
    differs=(
        "where this torch has no kernel (2.8: all but bfloat16 on Hopper GPUs) it is a product a group, with zeros where no "
        "group writes; gradients need no alignment"
    ),
    names={"grouped_mm": _build},
)
