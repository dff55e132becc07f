"""Take the graph's operators apart into those that inductor knows how to compile."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from torchspan.core.errors import PassError
from torchspan.core.graph import GRADIENT_OF, Graph
from torchspan.passes._base import Pass, PassContext, Stage, editable
from torchspan.passes._random import draws
from torchspan.private import fx, inductor

Table = Mapping[Any, Callable[..., Any]]


@dataclass(frozen=True)
class InductorDecomposition(Pass):
    """Replaces each operator that inductor's table takes apart by the operators that it becomes, where it stands.

    Passes that follow see the operators that inductor compiles. The new nodes have the metadata of the one that they come from:
    the module, the phase, the sequence number. Everything else stays as it is: collectives, higher-order operators (such as
    FlexAttention), operators that are not torch's, sizes that depend on data, inputs and outputs. Operators that draw random
    numbers stay whole, so that the random stream is eager's, and so do those that write in place, and those whose entry in the
    table decides by a number that depends on data.

    In float32 numbers stay within 1e-5; what is computed in a smaller dtype may be rounded at other places.
    """

    name: ClassVar[str] = "inductor_decomposition"
    summary: ClassVar[str] = "takes operators apart by inductor's table; collectives and random numbers stay"
    stage: ClassVar[Stage] = "operators"
    tolerance: ClassVar[float] = 1e-5

    def run(self, graph: Graph, context: PassContext) -> Graph:

        module = editable(graph)
        table = inductor.decompositions()
        done: Counter[str] = Counter()
        traced: dict[Hashable, GraphModule | None] = {}
        for node in list(module.graph.nodes):
            if not is_decomposed(node, table):
                continue
            inputs = list(dict.fromkeys(node.all_input_nodes))
            key = _form(node, inputs)
            if key is None or key not in traced:
                traced[key] = _traced(node, inputs, table)
            parts = traced[key]
            if parts is not None:
                _decompose(node, inputs, parts)
                done[str(node.target)] += 1
        module.graph.eliminate_dead_code()
        module.recompile()
        self._record(graph, module, done, context)
        return graph.with_module(module, str(self))

    def _record(self, before: Graph, module: GraphModule, done: Counter[str], context: PassContext) -> None:
        if not done:
            context.report.decide("pass", self.name, "nothing changed", "inductor's table takes none of its operators apart")
            return
        most = ", ".join(f"{count} {name}" for name, count in done.most_common(3))
        sizes = f"{len(before.module.graph.nodes)} → {len(module.graph.nodes)} nodes"
        reason = "inductor's table; collectives, random numbers and operators that are not torch's stay whole"
        context.report.decide("pass", self.name, f"{done.total()} operators taken apart ({most}, …): {sizes}", reason)

    def ensure(self, before: Graph, after: Graph) -> None:
        """The collectives are the same, and every gradient still has its mark."""
        if before.num_collectives() != after.num_collectives():
            raise PassError(
                f"{self.name} changed the collectives: {dict(before.num_collectives())} before, "
                f"{dict(after.num_collectives())} after"
            )
        lost = set(before.gradients().values()) - set(after.gradients().values())
        if lost:
            raise PassError(f"{self.name} lost the marks of the gradients of {', '.join(sorted(lost))}")


def is_decomposed(node: Node, table: Table) -> bool:
    """Whether the table takes a node's operator apart: torch's, drawing no random numbers, writing nothing."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target not in table:
        return False
    return not target._schema.is_mutable and not draws(node)


def _form(node: Node, inputs: Sequence[Node]) -> Hashable | None:
    """A key that is equal for nodes that are decomposed alike; None where sizes depend on data."""
    numbers = {source: index for index, source in enumerate(inputs)}
    sizes: list[Hashable] = []
    for source in inputs:
        value = source.meta["val"]
        if not isinstance(value, Tensor) or not all(type(size) is int for size in (*value.shape, *value.stride())):
            return None
        sizes.append((tuple(value.shape), value.stride(), value.dtype, value.device))
    return node.target, repr(map_arg((node.args, node.kwargs), lambda source: f"%{numbers[source]}")), *sizes


def _decompose(node: Node, inputs: Sequence[Node], traced: GraphModule) -> None:
    """Write what a node's operator becomes before it, and let that take its place."""
    graph = node.graph
    placeholders = [inner for inner in traced.graph.nodes if inner.op == "placeholder"]
    new: dict[Node, Any] = dict(zip(placeholders, inputs, strict=True))
    kept = {key: value for key, value in node.meta.items() if key not in ("val", "tensor_meta", GRADIENT_OF)}
    result: Any = None
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "output":
                result = map_arg(inner.args[0], new.__getitem__)
            elif inner.op != "placeholder":
                new[inner] = graph.node_copy(inner, new.__getitem__)
                new[inner].meta = {**kept, "val": inner.meta.get("val")}
    _replace(node, result)


def _replace(node: Node, result: Any) -> None:
    """Let `result`, nodes in the structure of the operator's result, stand for `node`."""
    if isinstance(result, Node):
        if GRADIENT_OF in node.meta:
            result.meta[GRADIENT_OF] = node.meta[GRADIENT_OF]
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            assert user.target is operator.getitem, f"{user.name} takes the results of {node.name} as one"
            part = result[user.args[1]]
            if GRADIENT_OF in user.meta:
                part.meta[GRADIENT_OF] = user.meta[GRADIENT_OF]
            user.replace_all_uses_with(part)
            node.graph.erase_node(user)
    node.graph.erase_node(node)


def _traced(node: Node, inputs: Sequence[Node], table: Table) -> GraphModule | None:
    """What `node` becomes, as a graph of `inputs`; None where it stays what it is, or one of its inputs is its result."""

    values = [source.meta["val"] for source in inputs]

    def call(*tensors: Any) -> Any:
        known = dict(zip(inputs, tensors, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    traced = fx.trace_fake(call, values, node.meta["val"], table)
    if traced is None:
        return None
    operators = [inner for inner in traced.graph.nodes if inner.op not in ("placeholder", "output")]
    is_same = [inner.target for inner in operators] == [node.target]
    holds_constants = any(inner.op == "get_attr" for inner in operators)
    parts = traced.graph.output_node().args[0]
    flat = parts if isinstance(parts, (tuple, list)) else [parts]
    is_passed_through = any(not isinstance(part, Node) or part.op == "placeholder" for part in flat)
    return None if is_same or holds_constants or is_passed_through else traced


PASS = InductorDecomposition
