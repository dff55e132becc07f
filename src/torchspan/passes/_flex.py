"""FlexAttention in a graph: its nodes, each of which has graphs of its own, and the dense operators that compute the same."""

from __future__ import annotations

import operator
from contextlib import nullcontext
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from torchspan.private import fx

FORWARD, BACKWARD = "flex_attention", "flex_attention_backward"


def is_flex(node: Node) -> bool:
    """Whether the node is FlexAttention, or its backward."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator) and _name(node) in _NAMES


_NAMES = (FORWARD, BACKWARD)


def _name(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def device_of(node: Node) -> torch.device:
    """Where a node of FlexAttention computes."""
    query = node.args[0]
    assert isinstance(query, Node), f"{node.name} has the query {query!r}, which is no node"
    device: torch.device = query.meta["val"].device
    return device


def make_dense(module: GraphModule, node: Node) -> None:
    """Put dense operators in the place of a node of FlexAttention, in place.

    They are those that torch itself calls on a CPU, with the node's own functions of scores and masks written out: the numbers
    stay bitwise what they were. What they write into their own results is written without; the strides of results are kept.
    """
    inputs = [argument for argument in node.all_input_nodes if not _is_subgraph(module, argument)]
    traced = _trace(module, node, inputs)
    inside: dict[Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs))
    with module.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op in ("call_function", "get_attr"):
                inside[inner] = _copy(module, traced, inner, inside, node.meta)
    (results,) = traced.graph.output_node().args
    _replace(node, map_arg(results, inside.__getitem__))


def _is_subgraph(module: GraphModule, node: Node) -> bool:
    return node.op == "get_attr" and isinstance(_held(module, node), GraphModule)


def _held(module: GraphModule, node: Node) -> Any:
    return operator.attrgetter(str(node.target))(module)


def _trace(module: GraphModule, node: Node, inputs: list[Node]) -> GraphModule:
    """The operators of the node, functional, as a graph of `inputs`."""
    function = fx.sdpa_dense_backward if _name(node) == BACKWARD else fx.sdpa_dense

    def call(*tensors: Any) -> Any:
        known = dict(zip(inputs, tensors))
        args, kwargs = map_arg(
            (node.args, node.kwargs), lambda source: known[source] if source in known else _held(module, source)
        )
        return function(*args, **kwargs)

    values = [_value(module, source) for source in inputs]
    mode = next((value.fake_mode for value in values if hasattr(value, "fake_mode")), nullcontext())
    with torch.no_grad(), mode:  # not tracing_mode="fake", which fakes the fake tensors again: torch 2.8 crashes on that
        traced = fx.make_fx(call)(*values)
    for inner in list(traced.graph.nodes):
        if inner.target is torch.ops.aten.copy_.default:
            _write_nothing(traced, inner)
    traced.graph.eliminate_dead_code()
    return traced


def _value(module: GraphModule, node: Node) -> Any:
    return node.meta["val"] if "val" in node.meta else _held(module, node)


def _write_nothing(traced: GraphModule, copy: Node) -> None:
    """In place of a copy into a new tensor: a tensor of its strides, made of what is copied."""
    into, source = copy.args[0], copy.args[1]
    assert isinstance(into, Node) and isinstance(source, Node), f"{copy.format_node()} copies what is no tensor"
    value = into.meta["val"]
    # from the outermost dimension in memory to the innermost
    order = sorted(range(value.ndim), key=lambda dim: (-value.stride(dim), dim))
    back = [order.index(dim) for dim in range(value.ndim)]
    aten = torch.ops.aten
    with traced.graph.inserting_before(copy):
        node = source
        for target, args in ((aten.permute.default, (order,)), (aten.clone.default, ()), (aten.permute.default, (back,))):
            options = {"memory_format": torch.contiguous_format} if target is aten.clone.default else {}
            strided = traced.graph.call_function(target, (node, *args), dict[str, Any](options))
            strided.meta["val"] = target(node.meta["val"], *args, **options)
            node = strided
    assert node.meta["val"].stride() == value.stride(), f"{node.meta['val'].stride()} is not {value.stride()}"
    for user in [user for user in into.users if user > copy]:
        user.replace_input_with(into, node)
    copy.replace_all_uses_with(node)
    traced.graph.erase_node(copy)


def _copy(module: GraphModule, traced: GraphModule, inner: Node, inside: dict[Node, Any], meta: dict[str, Any]) -> Node:
    """One traced node in the graph of `module`; it belongs where the node of FlexAttention with `meta` did."""
    if inner.op == "get_attr":  # a number that the trace holds as a tensor of no dimension
        number = _held(traced, inner)
        options = {"dtype": number.dtype, "device": number.device}
        copied = module.graph.call_function(torch.ops.aten.full.default, ([], number.item()), options)
        value = number
    else:
        copied, value = module.graph.node_copy(inner, inside.__getitem__), inner.meta.get("val")
    copied.meta = {key: content for key, content in meta.items() if key in _KEPT}
    copied.meta["val"] = value
    return copied


_KEPT = ("custom", "nn_module_stack", "stack_trace", "seq_nr", "partitioner_tag", "autograd_backward")


def _replace(node: Node, results: Any) -> None:
    """Give those who take a part of what `node` gave that part of `results`."""
    for user in list(node.users):
        assert user.target is operator.getitem, f"{user.format_node()} takes the results of {node.name} whole"
        part = results[user.args[1]]
        if isinstance(part, Node):
            user.replace_all_uses_with(part)
        elif part is not None:
            _replace(user, part)
        user.graph.erase_node(user)
    node.graph.erase_node(node)
