"""Take out of a traced graph what computes nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.runtime_assert import insert_deferred_runtime_asserts

from torchspan.private import fx

_VIEWS = (
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.expand.default,
    torch.ops.aten.slice.Tensor,
)
# what tells a compiler the range of a size; the check itself is an assertion beside it
_HINTS = (torch._check_is_size, torch.ops.aten.sym_constrain_range.default, torch.ops.aten.sym_constrain_range_for_size.default)


def clean(module: GraphModule) -> None:
    """Remove, in place, dead nodes, detaches, views that keep the shape, and writes into a temporary.

    Dead nodes are not only clutter: DTensor of torch before 2.10 works out the shapes of a sharded operator by calling it on
    uninitialised tensors, and make_fx records that call; run, an embedding's lookup would read random indices.
    A detach means nothing in a graph that holds its own backward. Assertions stay, and what they look at.
    """
    for node in module.graph.nodes:
        if _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    for node in module.graph.nodes:
        if writes_alone(node, "call_function"):
            make_functional(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def keep_checks(module: GraphModule) -> None:
    """Write into the graph, in place, what the program checks of sizes that depend on data (``torch._check``).

    A trace assumes that such a check holds and notes it beside the graph; a later batch for which it fails must be an error.
    """
    shapes = _shape_environment(module)
    if shapes is None or not shapes.deferred_runtime_asserts:
        return
    insert_deferred_runtime_asserts(module, shapes, "checked")
    for node in reversed(module.graph.nodes):
        if node.target in _HINTS or (node.target is torch.ops.aten._assert_scalar.default and node.args[0] is True):
            module.graph.erase_node(node)
    module.recompile()


def _shape_environment(module: GraphModule) -> Any:
    """Where a trace keeps what it knows of sizes; None if all were fixed."""
    values = (node.meta.get("val") for node in module.graph.nodes)
    modes = (getattr(value, "fake_mode", None) for value in values)
    return next((mode.shape_env for mode in modes if mode is not None), None)


def _is_identity(node: Node) -> bool:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return False
    if node.target in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):  # alias: how 2.15 records a detach
        return True
    if node.target not in _VIEWS:
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    return isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and _is_same_shape(before, after)


def _is_same_shape(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two shapes are the same for every batch; asks nothing of a size that depends on data."""
    return first.ndim == second.ndim and all(fx.statically_known_true(a == b) for a, b in zip(first.shape, second.shape))


def writes_alone(node: Node, into: str) -> bool:
    """Whether `node` writes in place into what a node of the kind `into` gave, of which nothing is a view.

    `into` is ``call_function`` for a tensor that the graph made, ``placeholder`` for an input. What the operator would give
    without writing must have the dtype of what it writes into.
    """
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable or not node.args:
        return False
    written = node.args[0]
    if not isinstance(written, Node) or written.op != into or _functional(node.target) is None:
        return False
    dtypes = {getattr(source.meta.get("val"), "dtype", None) for source in node.all_input_nodes}
    earlier = [user for user in written.users if user < node]
    is_alone = into == "placeholder" or not _may_alias(written)
    return len(dtypes) == 1 and is_alone and not any(_may_alias(user) for user in earlier)


def _may_alias(node: Node) -> bool:
    """Whether what `node` returns may share memory with what it is given."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(value.alias_info is not None for value in schema.returns)


def make_functional(node: Node) -> None:
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
