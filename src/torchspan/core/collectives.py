"""Collectives in an FX graph: several all-gathers, reduce-scatters or all-reduces become one, and nodes get another order.

A merged collective moves what its members moved, in one buffer; every number stays bitwise what it was. Nodes are placed by
numbers: a place is where a node wants to stand, and `reorder` gives an order in which the graph can run.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Graph, Node

from torchspan.core.errors import PassError

GATHER, SCATTER, REDUCE = "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"


def is_call(node: object, name: str) -> bool:
    """Whether `node` calls the functional collective `name`, such as ``all_gather_into_tensor``."""
    return isinstance(node, Node) and node.op == "call_function" and str(node.target) == f"_c10d_functional.{name}.default"


def value_of(node: Node) -> torch.Tensor:
    """The example value of `node`."""
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor), f"{node.name} is a {type(value).__name__}"
    return value


def wait_for(node: Node) -> Node | None:
    """The one wait of a collective, or None."""
    users = list(node.users)
    return users[0] if len(users) == 1 and is_call(users[0], "wait_tensor") else None


def origin_of(node: Any) -> Node | None:
    """The placeholder that `node` is made of by operators of one input that move nothing between ranks, or None."""
    while isinstance(node, Node) and node.op != "placeholder":
        inputs = node.all_input_nodes
        if node.op != "call_function" or len(inputs) != 1 or "_c10d_functional" in str(node.target):
            return None
        node = inputs[0]
    return node if isinstance(node, Node) else None


@dataclass(frozen=True)
class Collective:
    """One all-gather, reduce-scatter or all-reduce: its `node`, and the `wait` for it."""

    node: Node
    wait: Node

    @property
    def source(self) -> Node:
        """What is gathered, scattered or reduced."""
        source = self.node.args[0]
        assert isinstance(source, Node)
        return source

    @property
    def key(self) -> tuple[Any, ...]:
        """What must be equal for two of them to become one: the group, the operation, the dtype."""
        return (str(self.node.target), *map(str, self.node.args[1:]), value_of(self.source).dtype)


@dataclass(frozen=True)
class Merged:
    """A merged collective: the nodes up to the one that begins it, and those from the wait on."""

    begin: Sequence[Node]
    end: Sequence[Node]


def merge_gathers(graph: Graph, bucket: Sequence[Collective], places: dict[Node, float], meta: Mapping[str, Any]) -> Merged:
    """Gather what the members gather, all of it made of placeholders, in one buffer where the first of them stands.

    `meta` is the metadata of the new nodes; `places` gets their places.
    """
    first = bucket[0].node
    num_ranks: int = first.args[1]  # type: ignore[assignment]
    with graph.inserting_before(first):
        writer = _Writer(graph, meta, places[first], places)
        for member in bucket:  # what they are made of is made in time
            _hoist(member.source, writer.place, places)
        flat = writer.call(torch.ops.aten.cat.default, [writer.flat(member.source) for member in bucket])
        gathered = writer.call(first.target, flat, *first.args[1:])  # type: ignore[arg-type]
        begin = writer.written()
        rows = writer.view(writer.call(torch.ops._c10d_functional.wait_tensor.default, gathered), [num_ranks, -1])
        pieces = writer.cut(rows, 1, [value_of(member.source).numel() for member in bucket])
        # in memory of their own, as before: how a matrix product rounds may depend on where its operand begins
        pieces = [writer.contiguous(piece) for piece in pieces]
        results = [writer.view(piece, list(value_of(member.wait).shape)) for member, piece in zip(bucket, pieces)]
    _replace(graph, bucket, results)
    return Merged(begin, writer.written()[len(begin) :])


def merge_scatters(graph: Graph, bucket: Sequence[Collective], places: dict[Node, float], meta: Mapping[str, Any]) -> Merged:
    """Scatter what the members scatter, none of it made of another's result, in one buffer where the last of them stands."""
    last = bucket[-1].node
    num_ranks: int = last.args[2]  # type: ignore[assignment]
    with graph.inserting_before(last):
        writer = _Writer(graph, meta, places[last], places)
        rows = writer.call(torch.ops.aten.cat.default, [writer.rows(m.source, num_ranks) for m in bucket], 1)
        scattered = writer.call(last.target, writer.view(rows, [-1]), *last.args[1:])  # type: ignore[arg-type]
        return _given_out(writer, scattered, bucket)


def merge_reduces(graph: Graph, bucket: Sequence[Collective], places: dict[Node, float], meta: Mapping[str, Any]) -> Merged:
    """Reduce what the members reduce, none of it made of another's result, in one buffer where the last of them stands.

    Bitwise where the group has two ranks, whose sum has one order. Of three or more, a ring adds up the ranks in an order that
    depends on where in the buffer a number stands (seen on gloo, four ranks).
    """
    last = bucket[-1].node
    with graph.inserting_before(last):
        writer = _Writer(graph, meta, places[last], places)
        flat = writer.call(torch.ops.aten.cat.default, [writer.flat(member.source) for member in bucket])
        reduced = writer.call(last.target, flat, *last.args[1:])  # type: ignore[arg-type]
        return _given_out(writer, reduced, bucket)


def _given_out(writer: _Writer, moved: Node, bucket: Sequence[Collective]) -> Merged:
    """Wait for the buffer `moved`, in which the members' results stand one after the other, and put each in its place."""
    begin = writer.written()
    whole = writer.call(torch.ops._c10d_functional.wait_tensor.default, moved)
    pieces = writer.cut(whole, 0, [value_of(member.wait).numel() for member in bucket])
    results = [writer.view(piece, list(value_of(member.wait).shape)) for member, piece in zip(bucket, pieces)]
    _replace(writer.graph, bucket, results)
    return Merged(begin, writer.written()[len(begin) :])


class _Writer:
    """Writes nodes of one bucket, with the metadata that any traced node has; `place` says where they want to stand."""

    def __init__(self, graph: Graph, meta: Mapping[str, Any], place: float, places: dict[Node, float]) -> None:
        self.graph, self.meta, self.place, self.places = graph, meta, place, places
        self._nodes: list[Node] = []

    def written(self) -> list[Node]:
        """The nodes so far."""
        return [*self._nodes]

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        known = torch.fx.node.map_arg(args, lambda argument: argument.meta["val"])
        node.meta = {**self.meta, "val": target(*known, **kwargs)}
        self.places[node] = self.place
        self._nodes.append(node)
        return node

    def contiguous(self, node: Node) -> Node:
        """A copy that is laid out row by row, in memory of its own."""
        return self.call(torch.ops.aten.clone.default, node, memory_format=torch.contiguous_format)

    def view(self, node: Node, shape: list[int]) -> Node:
        return self.call(torch.ops.aten.view.default, node, shape)

    def flat(self, node: Node) -> Node:
        return self.view(node if value_of(node).is_contiguous() else self.contiguous(node), [-1])

    def rows(self, node: Node, num_rows: int) -> Node:
        """`node` with its first dimension cut into `num_rows`, and the rest of each row flat."""
        return self.view(node if value_of(node).is_contiguous() else self.contiguous(node), [num_rows, -1])

    def cut(self, node: Node, dim: int, sizes: list[int]) -> list[Node]:
        """Pieces of `node` along `dim`."""
        ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
        return [self.call(torch.ops.aten.slice.Tensor, node, dim, end - size, end) for size, end in zip(sizes, ends)]


def _replace(graph: Graph, bucket: Sequence[Collective], results: list[Node]) -> None:
    for member, result in zip(bucket, results):
        member.wait.replace_all_uses_with(result)
        graph.erase_node(member.wait)
        graph.erase_node(member.node)


def _hoist(node: Node, place: float, places: dict[Node, float]) -> None:
    while node.op != "placeholder":
        places[node] = min(places[node], place)
        node = node.all_input_nodes[0]


def reorder(graph: Graph, places: Mapping[Node, float]) -> None:
    """Sort `graph` topologically, in place; of nodes that can run, the one with the lowest of `places` runs first.

    Nodes that `places` leaves out keep the place they have. PassError if nodes wait for each other.
    """
    nodes = list(graph.nodes)
    rank = {node: (places.get(node, float(index)), index) for index, node in enumerate(nodes)}
    waiting = {node: len(node.all_input_nodes) for node in nodes}
    ready = [(rank[node], index) for index, node in enumerate(nodes) if not waiting[node]]
    index_of = {node: index for index, node in enumerate(nodes)}
    heapq.heapify(ready)
    order: list[Node] = []
    while ready:
        node = nodes[heapq.heappop(ready)[1]]
        order.append(node)
        for user in node.users:
            waiting[user] -= 1
            if not waiting[user]:
                heapq.heappush(ready, (rank[user], index_of[user]))
    if len(order) != len(nodes):
        stuck = [node.name for node in nodes if waiting[node]]
        raise PassError(f"{len(stuck)} nodes wait for each other: {', '.join(stuck[:5])}")
    for before, node in pairwise(order):
        before.append(node)
