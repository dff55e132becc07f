"""Take out of a traced graph what computes nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

_VIEWS = ("view", "_unsafe_view", "expand")


def clean(module: GraphModule) -> None:
    """Remove, in place, dead nodes, detaches, views that keep the shape, and writes into a temporary that nothing else reads.

    Dead nodes are not only clutter: DTensor of torch before 2.10 works out the shapes of a sharded operator by calling it on
    uninitialised tensors, and make_fx records that call; run, an embedding's lookup would read random indices.
    A detach means nothing in a graph that holds its own backward.
    """
    for node in module.graph.nodes:
        if _is_identity(node):
            node.replace_all_uses_with(node.args[0])
        elif _overwrites_a_temporary(node):
            node.target = _functional(node.target)
    module.graph.eliminate_dead_code()
    module.recompile()


def _is_identity(node: Node) -> bool:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return False
    if node.target in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):  # alias: how 2.15 records a detach
        return True
    if not any(node.target is getattr(torch.ops.aten, name).default for name in _VIEWS):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    return isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and before.shape == after.shape


def _overwrites_a_temporary(node: Node) -> bool:
    """Whether an in-place operator writes into a tensor that no one else can see: then its functional form is the same."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable or not node.args:
        return False
    written = node.args[0]
    if not isinstance(written, Node) or written.op != "call_function" or set(written.users) != {node}:
        return False
    returns = getattr(written.target, "_schema", None)
    is_view = returns is None or any(value.alias_info is not None for value in returns.returns)
    return not is_view and _functional(node.target) is not None


def _functional(operator: Any) -> Any:
    """The operator that gives what an in-place `operator` writes, or None."""
    packet, _, overload = str(operator).removeprefix("aten.").rpartition(".")
    if not str(operator).startswith("aten.") or not packet.endswith("_"):
        return None
    return getattr(getattr(torch.ops.aten, packet[:-1], None), overload, None)
