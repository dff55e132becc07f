"""Operators that this torch lacks, made when they are first looked up: ``torch.ops.aten._fused_rms_norm_backward``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchspan.backports._base import Backport

_RMS_NORM_BACKWARD = (
    "_fused_rms_norm_backward(Tensor grad_out, Tensor input, SymInt[] normalized_shape, Tensor rstd, Tensor? weight, "
    "bool[2] output_mask) -> (Tensor, Tensor)"
)


def _fused_rms_norm_backward(
    grad_out: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    rstd: Tensor,
    weight: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """The gradients of RMS normalisation: of the input, and of the weight; an empty tensor for what was not asked for.

    Args:
        grad_out: of the shape of `input`.
        input: what was normalised.
        normalized_shape: its last dimensions, over which that was done.
        rstd: the reciprocal of the root mean square, with size 1 in those.
        weight: of shape `normalized_shape`, or None.
        output_mask: which of the two gradients to compute.
    """
    num_outer = input.ndim - len(normalized_shape)
    inner, outer = [*range(num_outer, input.ndim)], [*range(num_outer)]
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    grad, x = grad_out.to(dtype), input.to(dtype)
    normed = x * rstd
    scaled = grad if weight is None else grad * weight.to(dtype)
    grad_input = grad_weight = input.new_empty(0)
    if output_mask[0]:
        size = x.shape[num_outer:].numel()
        grad_input = ((scaled - normed / size * (normed * scaled).sum(inner, keepdim=True)) * rstd).to(input.dtype)
    if output_mask[1] and weight is not None:
        product = grad * normed
        grad_weight = (product.sum(outer) if outer else product).to(weight.dtype)
    return grad_input, grad_weight


_OPERATORS: dict[tuple[str, str], tuple[str, Callable[..., Any]]] = {
    ("aten", "_fused_rms_norm_backward"): (_RMS_NORM_BACKWARD, _fused_rms_norm_backward)
}
_defined: set[tuple[str, str]] = set()
_libraries: list[torch.library.Library] = []  # the dispatcher keeps an operator as long as its library is there


def _define(namespace: str, name: str) -> None:
    if (namespace, name) in _defined:  # or being defined: torch looks the name up while it does that
        return
    _defined.add((namespace, name))
    schema, function = _OPERATORS[namespace, name]
    library = torch.library.Library(namespace, "FRAGMENT")
    library.define(schema)
    library.impl(name, function, "CompositeExplicitAutograd")
    _libraries.append(library)


def _with_operators(find: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    """The look-up of an operator in its namespace, which defines those that are missing."""

    @functools.wraps(find)
    def find_or_define(self: Any, op_name: str) -> Any:
        if (self.name, op_name) in _OPERATORS:
            BACKPORT.record_use(f"torch.ops.{self.name}.{op_name}")
            _define(self.name, op_name)
        return find(self, op_name)

    return find_or_define


def _lacks(module: object) -> bool:
    return not any(schema.name == "aten::_fused_rms_norm_backward" for schema in _native_schemas())


@functools.cache
def _native_schemas() -> tuple[Any, ...]:
    """What the dispatcher had before one of ours was defined."""
    return tuple(torch._C._jit_get_schemas_for_operator("aten::_fused_rms_norm_backward"))


BACKPORT = Backport(
    name="missing_operators",
    summary="operators that a newer torch has: torch.ops.aten._fused_rms_norm_backward",
    target="torch._ops",
    since="2.9.0",
    upstream="https://github.com/pytorch/pytorch/blob/v2.9.0/aten/src/ATen/native/native_functions.yaml",
    differs="it is made of plain operators, on every device; a gradient that was not asked for is an empty tensor",
    replaces={"_OpNamespace.__getattr__": _with_operators},
    lacks=_lacks,
)
