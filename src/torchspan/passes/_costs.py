"""Costs: what it takes to compute a node again, and which nodes can be computed again at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.fx import Node

OPERATIONS_A_BYTE = 16
"""How many multiplications take the time of one byte moved: of the order of every processor's balance."""

EXPENSIVE = (
    "mm|addmm|bmm|baddbmm|_scaled_mm|_grouped_mm|grouped_rows_mm|convolution|*scaled_dot_product*|flex_attention|topk|sort"
)
"""Operators whose results are better kept: products, attention, and the choice of experts, which is a few whole numbers."""

_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "_scaled_mm": 0, "_grouped_mm": 0, "grouped_rows_mm": 0}
"""Products of matrices: which argument is the one whose last dimension is summed over."""


def operator_name(operator: Any) -> str:
    """The name of an operator without its namespace and overload.

    >>> operator_name(torch.ops.aten.mm.default)
    'mm'
    """
    parts = str(operator).split(".")
    return parts[1] if len(parts) > 1 else getattr(operator, "__name__", parts[0])


def answers(operator: Any, patterns: Sequence[str]) -> bool:
    """Whether an operator answers to a pattern, by its short name (``mm``) or its whole one (``aten.mm.default``).

    >>> answers(torch.ops.aten.mm.default, ["aten.mm.*"]), answers(torch.ops.aten.mm.default, ["addmm", "bmm"])
    (True, False)
    """
    names = (operator_name(operator), str(operator))
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def cost_of(node: Node) -> int:
    """What computing `node` takes, in multiplications; sizes that depend on data count as one."""
    values = [value for used in node.all_input_nodes for value in _tensors(used)]
    num_bytes = sum(_numel(value) * value.element_size() for value in [*values, *_tensors(node)])
    return _num_operations(node) + OPERATIONS_A_BYTE * num_bytes


def _num_operations(node: Node) -> int:
    name, tensors = operator_name(node.target), [_tensors(used) for used in node.args if isinstance(used, Node)]
    if name in _PRODUCTS and len(tensors) > _PRODUCTS[name]:
        summed = tensors[_PRODUCTS[name]][0].shape[-1]
        return 2 * _numel(_tensors(node)[0]) * _number(summed)
    if "scaled_dot_product" in name or name == "flex_attention":
        query, key = tensors[0][0], tensors[1][0]
        return 4 * _numel(query) * _number(key.shape[-2])
    if "convolution" in name:
        weight = tensors[1][0]
        return 2 * _numel(_tensors(node)[0]) * _numel(weight) // max(1, _number(weight.shape[0]))
    return 0


def _tensors(node: Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    return [part for part in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(part, torch.Tensor)]


def _numel(value: torch.Tensor) -> int:
    return math.prod(map(_number, value.shape))


def _number(size: Any) -> int:
    return size if isinstance(size, int) else 1


def why_not_again(node: Node) -> str | None:
    """Why `node` may not be computed a second time, in a few words; None if it may.

    A collective can be repeated if all ranks do so: a caller that repeats collectives accepts the reason ``collective``.
    """
    target = node.target
    if node.op != "call_function" or isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return "no operator that gives a tensor"
    if getattr(target, "__name__", "") == "getitem" or isinstance(target, torch._ops.HigherOrderOperator):
        return None
    if not isinstance(target, torch._ops.OpOverload):
        return "unknown to torch's operators"
    if _is_collective(node):
        return "collective"
    if target._schema.is_mutable or not target._schema.returns:
        return "a write or a check"
    if torch.Tag.dynamic_output_shape in target.tags or torch.Tag.data_dependent_output in target.tags:
        return "a size that depends on data"
    return "random" if torch.Tag.nondeterministic_seeded in target.tags and not _drops_nothing(node) else None


def _is_collective(node: Node) -> bool:
    name = str(node.target)
    return "c10d" in name or name.startswith(("torchspan.all_to_all", "symm_mem."))


def _drops_nothing(node: Node) -> bool:
    """Whether an operator is random only by its dropout, and that is zero: attention without dropout."""
    schema = node.target._schema  # type: ignore[union-attr]
    for index, argument in enumerate(schema.arguments):
        if argument.name == "dropout_p":
            rate = node.args[index] if index < len(node.args) else node.kwargs.get("dropout_p", argument.default_value)
            return isinstance(rate, (int, float)) and rate == 0
    return False
