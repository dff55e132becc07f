"""Make a traced graph write nothing: what it wrote into its inputs becomes further outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from torchspan.capture._clean import make_functional, writes_alone
from torchspan.core.graph import output_node

Trace = Callable[[Callable[..., Any], Sequence[Any]], GraphModule]


def without_writes(module: GraphModule, trace: Trace) -> tuple[GraphModule, list[int]]:
    """The same computation without writes, and the indices of the inputs that it wrote into; their values are the last outputs.

    Graphs without writes are given back as they are, and updates of whole inputs are taken out where they stand. Graphs with
    other writes are traced again by `trace`, through torch's functionalization, which also knows what a write into a view does
    to its base; nodes keep what they say of their origin.
    """
    _say_that_batch_norm_writes(module)
    plain = _plain_writes_returned(module)
    if not any(_writes(node) for node in module.graph.nodes):
        return module, plain
    examples = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    replayed = torch.func.functionalize(_Replay(module).run, remove="mutations")
    with torch.no_grad():
        functional = trace(replayed, examples)
    return functional, plain + _returned_instead_of_written(functional)


def _plain_writes_returned(module: GraphModule) -> list[int]:
    """Return the last value of each input that is updated as a whole and seen by no view, instead of writing it."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    others = {node.args[0] for node in module.graph.nodes if _writes(node) and not writes_alone(node, "placeholder")}
    values: dict[Node, Node] = {}
    for node in list(module.graph.nodes):
        if writes_alone(node, "placeholder") and node.args[0] not in others:
            values[node.args[0]] = node
            make_functional(node)
    written = [index for index, node in enumerate(placeholders) if node in values]
    output = output_node(module.graph)
    output.args = ([*output.args[0], *(values[placeholders[index]] for index in written)],)
    module.recompile()
    return written


class _Replay(Interpreter):
    """Runs a graph under functionalization, which sees only what writes or makes a view: the rest stays as it was traced."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call one node's operator."""
        from torchspan.capture._kernels import below_functionalization

        if isinstance(target, torch._ops.OpOverload) and not _touches_memory(target):
            return below_functionalization(target, args, kwargs)
        return super().call_function(target, args, kwargs)


def _touches_memory(operator: torch._ops.OpOverload) -> bool:
    """Whether an operator writes into what it is given, or may return a part of it."""
    schema = operator._schema
    return schema.is_mutable or any(value.alias_info is not None for value in schema.returns)


def _writes(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _say_that_batch_norm_writes(module: GraphModule) -> None:
    """``native_batch_norm`` updates running statistics and does not say so; ``_native_batch_norm_legit`` does in its schema."""
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.native_batch_norm.default and isinstance(node.args[3], Node):
            node.target = torch.ops.aten._native_batch_norm_legit.default


def _returned_instead_of_written(module: GraphModule) -> list[int]:
    """Take the writes into inputs, which functionalization leaves at the end, out of a graph, and return what they write."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    written: dict[int, Node] = {}
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten.copy_.default and node.args[0] in placeholders:
            written[placeholders.index(node.args[0])] = node.args[1]
            module.graph.erase_node(node)
    output = output_node(module.graph)
    output.args = ([*output.args[0], *(written[index] for index in sorted(written))],)
    return sorted(written)
