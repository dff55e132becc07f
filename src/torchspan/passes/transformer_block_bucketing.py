"""Gather the FSDP parameters of one transformer block in one all-gather, and scatter their gradients in one reduce-scatter."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph as FxGraph
from torch.fx import Node

from torchspan.core.errors import PassError
from torchspan.core.graph import Graph
from torchspan.passes._base import Pass, PassContext, editable, refuse_writes
from torchspan.passes._blocks import block_of
from torchspan.passes._order import reorder


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
                _merge_gathers(module.graph, bucket, place)
        if self.scatter:
            for bucket in _buckets(_gradient_scatters(result)):
                _merge_scatters(module.graph, bucket, place)
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
class _Member:
    """One collective that can be merged: its `node`, the `wait` for it, and the `key` that must be equal in a bucket."""

    node: Node
    wait: Node
    key: Hashable
    block: str

    @property
    def source(self) -> Node:
        """What is gathered or scattered."""
        source = self.node.args[0]
        assert isinstance(source, Node)
        return source


def _buckets(members: Iterator[_Member]) -> list[list[_Member]]:
    """Members that move together, two or more, in the order of the graph."""
    found: dict[Hashable, list[_Member]] = defaultdict(list)
    for member in members:
        found[member.block, member.key].append(member)
    return [bucket for bucket in found.values() if len(bucket) > 1]


def _is_call(node: object, name: str) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and str(node.target) == f"_c10d_functional.{name}.default"


def _value(node: Node) -> torch.Tensor:
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor), f"{node.name} is a {type(value).__name__}"
    return value


def _wait_for(node: Node) -> Node | None:
    """The one wait of a collective, or None."""
    users = list(node.users)
    return users[0] if len(users) == 1 and _is_call(users[0], "wait_tensor") else None


def _parameter_gathers(graph: Graph) -> Iterator[_Member]:
    """All-gathers of a stored parameter of a block."""
    names = {node: spec.name for node, spec in zip(graph.placeholders(), graph.inputs) if spec.kind == "parameter"}
    for node in graph.module.graph.nodes:
        if not _is_call(node, "all_gather_into_tensor"):
            continue
        origin, wait = _origin(node.args[0]), _wait_for(node)
        block = block_of(names[origin]) if origin in names else None
        if block is not None and wait is not None:
            yield _Member(node, wait, (node.args[1:], _value(node.args[0]).dtype), block)


def _origin(node: Any) -> Node | None:
    """The placeholder that `node` is made of by operators of one input that move nothing between ranks, or None."""
    while isinstance(node, Node) and node.op != "placeholder":
        inputs = node.all_input_nodes
        if node.op != "call_function" or len(inputs) != 1 or "_c10d_functional" in str(node.target):
            return None
        node = inputs[0]
    return node if isinstance(node, Node) else None


def _gradient_scatters(graph: Graph) -> Iterator[_Member]:
    """Reduce-scatters whose result is, but for its shape or dtype, the gradient of a parameter of a block."""
    gradients = {
        value: spec.name
        for value, spec in zip(graph.output_values(), graph.outputs)
        if spec.kind == "gradient" and isinstance(value, Node)
    }
    for node in graph.module.graph.nodes:
        if not _is_call(node, "reduce_scatter_tensor"):
            continue
        wait = _wait_for(node)
        name = _gradient_name(wait, gradients) if wait is not None else None
        block = block_of(name) if name is not None else None
        if block is not None and wait is not None:
            yield _Member(node, wait, (node.args[1:], _value(node.args[0]).dtype), block)


def _gradient_name(node: Node, gradients: dict[Node, str]) -> str | None:
    """The parameter whose gradient `node` becomes by operators that nothing else reads, or None."""
    while node not in gradients:
        users = list(node.users)
        if len(users) != 1 or users[0].op != "call_function" or len(users[0].all_input_nodes) != 1:
            return None
        node = users[0]
    return gradients[node]


# writing the merged collective


@dataclass(frozen=True)
class _Writer:
    """Writes nodes of one bucket, with the metadata that any traced node has; `place` says where they want to stand."""

    graph: FxGraph
    meta: dict[str, Any]
    place: float
    places: dict[Node, float]

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        known = torch.fx.node.map_arg(args, lambda argument: argument.meta["val"])
        node.meta = {**self.meta, "val": target(*known, **kwargs)}
        self.places[node] = self.place
        return node

    def contiguous(self, node: Node) -> Node:
        """A copy that is laid out row by row, in memory of its own."""
        return self.call(torch.ops.aten.clone.default, node, memory_format=torch.contiguous_format)

    def view(self, node: Node, shape: list[int]) -> Node:
        return self.call(torch.ops.aten.view.default, node, shape)

    def rows(self, node: Node, num_rows: int) -> Node:
        """`node` with its first dimension cut into `num_rows`, and the rest of each row flat."""
        return self.view(node if _value(node).is_contiguous() else self.contiguous(node), [num_rows, -1])

    def cut(self, node: Node, dim: int, sizes: list[int]) -> list[Node]:
        """Pieces of `node` along `dim`."""
        ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
        return [self.call(torch.ops.aten.slice.Tensor, node, dim, end - size, end) for size, end in zip(sizes, ends)]


def _writer(graph: FxGraph, bucket: list[_Member], at: Node, places: dict[Node, float]) -> _Writer:
    custom = {"module": bucket[0].block, **{k: v for k, v in at.meta.get("custom", {}).items() if k == "phase"}}
    kept = {key: value for key, value in at.meta.items() if key in ("partitioner_tag", "seq_nr", "autograd_backward")}
    return _Writer(graph, {**kept, "custom": custom}, places[at], places)


def _merge_gathers(graph: FxGraph, bucket: list[_Member], places: dict[Node, float]) -> None:
    """Gather the members in one buffer, where the first of them stands."""
    first = bucket[0].node
    num_ranks: int = first.args[1]  # type: ignore[assignment]
    with graph.inserting_before(first):
        writer = _writer(graph, bucket, first, places)
        for member in bucket:  # what they are made of is made in time
            _hoist(member.source, writer.place, places)
        flat = writer.call(torch.ops.aten.cat.default, [_flat(writer, member.source) for member in bucket])
        gathered = writer.call(first.target, flat, *first.args[1:])  # type: ignore[arg-type]
        rows = writer.view(writer.call(torch.ops._c10d_functional.wait_tensor.default, gathered), [num_ranks, -1])
        pieces = writer.cut(rows, 1, [_value(member.source).numel() for member in bucket])
        # in memory of their own, as before: how a matrix product rounds may depend on where its operand begins
        pieces = [writer.contiguous(piece) for piece in pieces]
        results = [writer.view(piece, list(_value(member.wait).shape)) for member, piece in zip(bucket, pieces)]
    _replace(graph, bucket, results)


def _merge_scatters(graph: FxGraph, bucket: list[_Member], places: dict[Node, float]) -> None:
    """Scatter the members in one buffer, where the last of them stands."""
    last = bucket[-1].node
    num_ranks: int = last.args[2]  # type: ignore[assignment]
    with graph.inserting_before(last):
        writer = _writer(graph, bucket, last, places)
        rows = writer.call(torch.ops.aten.cat.default, [writer.rows(m.source, num_ranks) for m in bucket], 1)
        scattered = writer.call(last.target, writer.view(rows, [-1]), *last.args[1:])  # type: ignore[arg-type]
        mine = writer.call(torch.ops._c10d_functional.wait_tensor.default, scattered)
        pieces = writer.cut(mine, 0, [_value(member.wait).numel() for member in bucket])
        results = [writer.view(piece, list(_value(member.wait).shape)) for member, piece in zip(bucket, pieces)]
    _replace(graph, bucket, results)


def _flat(writer: _Writer, node: Node) -> Node:
    return writer.view(node if _value(node).is_contiguous() else writer.contiguous(node), [-1])


def _replace(graph: FxGraph, bucket: list[_Member], results: list[Node]) -> None:
    for member, result in zip(bucket, results):
        member.wait.replace_all_uses_with(result)
        graph.erase_node(member.wait)
        graph.erase_node(member.node)


def _hoist(node: Node, place: float, places: dict[Node, float]) -> None:
    while node.op != "placeholder":
        places[node] = min(places[node], place)
        node = node.all_input_nodes[0]


def _moved(graph: Graph) -> Counter[tuple[str, Any]]:
    """How many numbers each kind of collective moves in each group."""
    moved: Counter[tuple[str, Any]] = Counter()
    for node in graph.module.graph.nodes:
        for kind in ("all_gather_into_tensor", "reduce_scatter_tensor"):
            if _is_call(node, kind):
                moved[kind, str(node.args[-1])] += math.prod(_value(node.args[0]).shape)
    return moved


PASS = TransformerBlockBucketing
