"""An operator of our own for the products of a mixture of experts: one matrix for each group of rows.

Shapes, as suffixes of names: N rows, E experts, D input width, F output width.

torch's own grouped product has no kernel on a CPU before torch 2.9 and none for float64, and refuses fake float32 tensors on
some releases. This one is the same loop on every torch and every device. In a graph it is one node, whatever the number of
experts and however many rows each has. On a GPU the loop waits for the counts to reach the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torchspan.core.errors import InputError

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def grouped_mm(x_ND: Tensor, w_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply each group of rows by the matrix of its expert.

    The first ``counts_E[0]`` rows meet ``w_EDF[0]``, the next ``counts_E[1]`` rows ``w_EDF[1]``, and so on. An expert may have
    no rows. Under fake tensors the number of rows may be a size that is not known, as after an all-to-all.

    Args:
        x_ND: the rows, sorted by expert: float32, bfloat16 or float64.
        w_EDF: a matrix for each expert, of the dtype of `x_ND`.
        counts_E: int64, how many rows each expert has; together N.

    Returns:
        ``(N, F)``, of the dtype of `x_ND`.

    Raises:
        InputError: shapes or dtypes that do not fit; counts that are negative or do not add up to N.

    >>> x_ND = torch.tensor([[1.0], [2.0], [3.0]])
    >>> w_EDF = torch.tensor([[[10.0]], [[100.0]], [[1000.0]]])
    >>> grouped_mm(x_ND, w_EDF, torch.tensor([2, 0, 1])).flatten().tolist()
    [10.0, 20.0, 3000.0]
    """
    _check(x_ND, w_EDF, counts_E)
    y_NF: Tensor = torch.ops.torchspan.grouped_rows_mm(x_ND, w_EDF, counts_E)
    return y_NF


def _check(x_ND: Tensor, w_EDF: Tensor, counts_E: Tensor) -> None:
    """What can be known without reading a value; runs under fake tensors too."""
    if x_ND.ndim != 2 or w_EDF.ndim != 3 or counts_E.ndim != 1:
        raise InputError(
            f"rows have {x_ND.ndim} dimensions, weights {w_EDF.ndim}, counts {counts_E.ndim}; "
            "expected 2 (rows, width), 3 (experts, width, output width) and 1 (experts)"
        )
    if x_ND.shape[1] != w_EDF.shape[1]:
        raise InputError(f"rows are {x_ND.shape[1]} wide, the experts' weights take {w_EDF.shape[1]}; expected the same width")
    if counts_E.shape[0] != w_EDF.shape[0]:
        raise InputError(f"there are {counts_E.shape[0]} counts for {w_EDF.shape[0]} experts' weights; expected one for each")
    if x_ND.dtype != w_EDF.dtype or x_ND.dtype not in DTYPES:
        raise InputError(f"rows are {x_ND.dtype}, weights {w_EDF.dtype}; expected the same of float32, bfloat16 and float64")
    if counts_E.dtype != torch.int64:
        raise InputError(f"counts are {counts_E.dtype}; expected torch.int64")


def _groups(num_rows: int, counts_E: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and where they are."""
    counts = counts_E.tolist()
    if min(counts, default=0) < 0 or sum(counts) != num_rows:
        raise InputError(
            f"counts are {counts}, there are {num_rows} rows; expected counts of 0 or more that add up to the rows"
        )
    begin = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(begin, begin + count)
        begin += count


# The operators. They are made by `define` and `impl`, not by `custom_op`, whose first call imports torch.compile's front end:
# seconds, in a process that may never compile.

_TRACEABLE = (torch.Tag.pt2_compliant_tag,)
_PRODUCT, _WEIGHT = "torchspan::grouped_rows_mm", "torchspan::grouped_rows_mm_weight"
torch.library.define(_PRODUCT, "(Tensor x_ND, Tensor w_EDF, Tensor counts_E) -> Tensor", tags=_TRACEABLE)
torch.library.define(_WEIGHT, "(Tensor x_ND, Tensor grad_NF, Tensor counts_E) -> Tensor", tags=_TRACEABLE)


@torch.library.impl(_PRODUCT, "CompositeExplicitAutograd")
def _product(x_ND: Tensor, w_EDF: Tensor, counts_E: Tensor) -> Tensor:
    y_NF = x_ND.new_empty((x_ND.shape[0], w_EDF.shape[2]))
    for expert, rows in _groups(x_ND.shape[0], counts_E):
        torch.mm(x_ND[rows], w_EDF[expert], out=y_NF[rows])
    return y_NF


@torch.library.register_fake(_PRODUCT)
def _fake_product(x_ND: Tensor, w_EDF: Tensor, counts_E: Tensor) -> Tensor:
    return x_ND.new_empty((x_ND.shape[0], w_EDF.shape[2]))


@torch.library.impl(_WEIGHT, "CompositeExplicitAutograd")
def _weight(x_ND: Tensor, grad_NF: Tensor, counts_E: Tensor) -> Tensor:
    """The gradient of weights: for each expert, its rows of `x_ND`, transposed, times those of `grad_NF`; else zeros."""
    grad_EDF = x_ND.new_zeros((counts_E.shape[0], x_ND.shape[1], grad_NF.shape[1]))
    for expert, rows in _groups(x_ND.shape[0], counts_E):
        torch.mm(x_ND[rows].T, grad_NF[rows], out=grad_EDF[expert])
    return grad_EDF


@torch.library.register_fake(_WEIGHT)
def _fake_weight(x_ND: Tensor, grad_NF: Tensor, counts_E: Tensor) -> Tensor:
    return x_ND.new_empty((counts_E.shape[0], x_ND.shape[1], grad_NF.shape[1]))


# Each one's gradients are products of the two kinds again, so that they can be differentiated any number of times.


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _product_gradients(ctx: Any, grad_NF: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_ND, w_EDF, counts_E = ctx.saved_tensors
    operators = torch.ops.torchspan
    grad_ND = operators.grouped_rows_mm(grad_NF, w_EDF.transpose(1, 2), counts_E) if ctx.needs_input_grad[0] else None
    grad_EDF = operators.grouped_rows_mm_weight(x_ND, grad_NF, counts_E) if ctx.needs_input_grad[1] else None
    return grad_ND, grad_EDF, None


def _weight_gradients(ctx: Any, grad_EDF: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_ND, grad_NF, counts_E = ctx.saved_tensors
    product = torch.ops.torchspan.grouped_rows_mm
    grad_x_ND = product(grad_NF, grad_EDF.transpose(1, 2), counts_E) if ctx.needs_input_grad[0] else None
    grad_grad_NF = product(x_ND, grad_EDF, counts_E) if ctx.needs_input_grad[1] else None
    return grad_x_ND, grad_grad_NF, None


torch.library.register_autograd(_PRODUCT, _product_gradients, setup_context=_keep_for_backward)
torch.library.register_autograd(_WEIGHT, _weight_gradients, setup_context=_keep_for_backward)
