"""Gather the FSDP parameters of one transformer block in one all-gather, and scatter their gradients in one reduce-scatter."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from torchspan.core.collectives import (
    Collective,
    is_call,
    merge_gathers,
    merge_scatters,
    origin_of,
    reorder,
    value_of,
    wait_for,
)
from torchspan.core.errors import PassError
from torchspan.core.graph import Graph
from torchspan.passes._base import Pass, PassContext, editable, refuse_writes
from torchspan.passes._blocks import block_of


@dataclass(frozen=True)
class TransformerBlockBucketing(Pass):
    """Merges collectives by block, process group and dtype; every number stays bitwise what it was.

    A block is what a parameter's name says up to its first number: ``layers.3`` of ``layers.3.attention.wq.weight``. Gathered
    are parameters that are read where they are stored; a gather of anything that was computed stays where it is. With `gather`
    or `scatter` false, that half is left alone.
    """

    name: ClassVar[str] = "transformer_block_bucketing"
    summary: ClassVar[str] = "one all-gather and one reduce-scatter a transformer block, in place of one a parameter"

    gather: bool = True
    scatter: bool = True

    def require(self, graph: Graph) -> None:
        refuse_writes(self.name, graph)

    def run(self, graph: Graph, context: PassContext) -> Graph:
        module = editable(graph)
        result = graph.with_module(module, str(self))
        place = {node: float(index) for index, node in enumerate(module.graph.nodes)}
        if self.gather:
            for bucket in _buckets(_parameter_gathers(result)):
                merge_gathers(module.graph, bucket, place, _meta(bucket, bucket[0].node))
        if self.scatter:
            for bucket in _buckets(_gradient_scatters(result)):
                merge_scatters(module.graph, bucket, place, _meta(bucket, bucket[-1].node))
        reorder(module.graph, place)
        module.graph.eliminate_dead_code()
        module.recompile()
        self._record(graph, result, context)
        return result

    def ensure(self, before: Graph, after: Graph) -> None:
        """Fewer collectives or as many, and as many numbers moved by each kind in each group."""
        fewer, counts = after.num_collectives(), before.num_collectives()
        for kind in fewer | counts:
            if fewer[kind] > counts[kind]:
                raise PassError(f"{self.name} made {fewer[kind]} {kind} of {counts[kind]}; expected no more")
        if _moved(before) != _moved(after):
            raise PassError(f"{self.name} changed how many numbers are moved: {_moved(before)} before, {_moved(after)} after")

    def _record(self, before: Graph, after: Graph, context: PassContext) -> None:
        old, new = before.num_collectives(), after.num_collectives()
        changed = [f"{kind} {old[kind]} → {new[kind]}" for kind in old if old[kind] != new[kind]]
        if changed:
            context.report.decide("pass", self.name, ", ".join(changed), "parameters of one block move together")
        else:
            context.report.decide("pass", self.name, "nothing changed", "no block has two FSDP parameters that can be merged")


@dataclass(frozen=True)
class _Member(Collective):
    """One collective that can be merged with the others of its `block`."""

    block: str


def _buckets(members: Iterator[_Member]) -> list[list[_Member]]:
    """Members that move together, two or more, in the order of the graph."""
    found: dict[Hashable, list[_Member]] = defaultdict(list)
    for member in members:
        found[member.block, member.key].append(member)
    return [bucket for bucket in found.values() if len(bucket) > 1]


def _parameter_gathers(graph: Graph) -> Iterator[_Member]:
    """All-gathers of a stored parameter of a block."""
    names = {node: spec.name for node, spec in zip(graph.placeholders(), graph.inputs) if spec.kind == "parameter"}
    for node in graph.module.graph.nodes:
        if not is_call(node, "all_gather_into_tensor"):
            continue
        origin, wait = origin_of(node.args[0]), wait_for(node)
        block = block_of(names[origin]) if origin in names else None
        if block is not None and wait is not None:
            yield _Member(node, wait, block)


def _gradient_scatters(graph: Graph) -> Iterator[_Member]:
    """Reduce-scatters whose result is, but for its shape or dtype, the gradient of a parameter of a block."""
    gradients = {
        value: spec.name
        for value, spec in zip(graph.output_values(), graph.outputs)
        if spec.kind == "gradient" and isinstance(value, Node)
    }
    for node in graph.module.graph.nodes:
        if not is_call(node, "reduce_scatter_tensor"):
            continue
        wait = wait_for(node)
        name = _gradient_name(wait, gradients) if wait is not None else None
        block = block_of(name) if name is not None else None
        if block is not None and wait is not None:
            yield _Member(node, wait, block)


def _gradient_name(node: Node, gradients: dict[Node, str]) -> str | None:
    """The parameter whose gradient `node` becomes by operators that nothing else reads, or None."""
    while node not in gradients:
        users = list(node.users)
        if len(users) != 1 or users[0].op != "call_function" or len(users[0].all_input_nodes) != 1:
            return None
        node = users[0]
    return gradients[node]


def _meta(bucket: list[_Member], at: Node) -> dict[str, Any]:
    """The metadata of the nodes that take a bucket's place."""
    custom = {"module": bucket[0].block, **{k: v for k, v in at.meta.get("custom", {}).items() if k == "phase"}}
    kept = {key: value for key, value in at.meta.items() if key in ("partitioner_tag", "seq_nr", "autograd_backward")}
    return {**kept, "custom": custom}


def _moved(graph: Graph) -> Counter[tuple[str, Any]]:
    """How many numbers each kind of collective moves in each group."""
    moved: Counter[tuple[str, Any]] = Counter()
    for node in graph.module.graph.nodes:
        for kind in ("all_gather_into_tensor", "reduce_scatter_tensor"):
            if is_call(node, kind):
                moved[kind, str(node.args[-1])] += math.prod(value_of(node.args[0]).shape)
    return moved


PASS = TransformerBlockBucketing
