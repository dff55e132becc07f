"""Values of a graph's nodes as text, such as ``f32[4, 16]``."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
    torch.complex64: "c64",
    torch.complex128: "c128",
}
"""Dtypes as torch's printed graphs shorten them."""


def shown_value(value: Any) -> str:
    """A node's example value as text.

    >>> shown_value(torch.ones(4, 16)), shown_value([torch.ones(2, dtype=torch.int64), None]), shown_value(3)
    ('f32[4, 16]', '[i64[2], None]', '3')
    """
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(map(str, value.shape))
        return f"{SHORT.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{sizes}]"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(shown_value, value))}]"
    return str(value)


def shown_node(node: Node) -> str:
    """A node by its name and what it calls.

    >>> graph = torch.fx.Graph()
    >>> shown_node(graph.call_function(torch.ops.aten.relu.default, (graph.placeholder("x"),)))
    'relu_default (aten.relu.default)'
    """
    if node.op in ("placeholder", "output"):
        return f"{node.name} ({node.op})"
    return f"{node.name} ({target_name(node)})"


def target_name(node: Node) -> str:
    """What a node calls, as text: an operator's printed name, a function's own name, a submodule's path.

    >>> target_name(torch.fx.Graph().call_function(torch.ops.aten.ones.default, ([2],)))
    'aten.ones.default'
    """
    if isinstance(node.target, (str, torch._ops.OpOverload)):
        return str(node.target)
    return getattr(node.target, "__name__", str(node.target))
