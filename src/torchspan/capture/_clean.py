"""Take out of a traced graph what computes nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

_VIEWS = (
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.expand.default,
    torch.ops.aten.slice.Tensor,
)


def clean(module: GraphModule) -> None:
    """Remove, in place, dead nodes, detaches, views that keep the shape, and writes into a temporary.

    Dead nodes are not only clutter: DTensor of torch before 2.10 works out the shapes of a sharded operator by calling it on
    uninitialised tensors, and make_fx records that call; run, an embedding's lookup would read random indices.
    A detach means nothing in a graph that holds its own backward.
    """
    for node in module.graph.nodes:
        if _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    for node in module.graph.nodes:
        if _writes_into_a_temporary(node):
            _make_functional(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def _is_identity(node: Node) -> bool:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return False
    if node.target in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):  # alias: how 2.15 records a detach
        return True
    if node.target not in _VIEWS:
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    return isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and before.shape == after.shape


def _writes_into_a_temporary(node: Node) -> bool:
    """Whether an in-place operator writes into a tensor that the graph made and of which nothing is a view."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable or not node.args:
        return False
    written = node.args[0]
    if not isinstance(written, Node) or written.op != "call_function" or _functional(node.target) is None:
        return False
    earlier = [user for user in written.users if user < node]
    return not _may_alias(written) and not any(_may_alias(user) for user in earlier)


def _may_alias(node: Node) -> bool:
    """Whether what `node` returns may share memory with what it is given."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(value.alias_info is not None for value in schema.returns)


def _make_functional(node: Node) -> None:
    """Give the written value a name of its own: what reads the tensor later reads that."""
    written = node.args[0]
    assert isinstance(written, Node)
    for user in [user for user in written.users if user > node]:
        user.replace_input_with(written, node)
    node.target = _functional(node.target)


def _functional(operator: Any) -> Any:
    """The operator that gives what an in-place `operator` writes, or None."""
    packet, _, overload = str(operator).removeprefix("aten.").rpartition(".")
    if not str(operator).startswith("aten.") or not packet.endswith("_"):
        return None
    return getattr(getattr(torch.ops.aten, packet[:-1], None), overload, None)
