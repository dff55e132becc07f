"""Overlap: an order in which collectives of an FX graph run while other nodes compute.

Orders are written as places, the numbers that `torchspan.core.collectives.reorder` sorts a graph by. Nothing is measured, so
every rank that has the same graph gets the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch.fx import Graph, Node

from torchspan.core.collectives import GATHER, SCATTER, Collective, is_call, value_of


@dataclass(frozen=True)
class Bucket:
    """What moves together: the nodes up to its beginning, those from its wait on, and how many bytes it moves."""

    begin: Sequence[Node]
    end: Sequence[Node]
    size_bytes: int


def size_of(members: Iterable[Collective]) -> int:
    """How many bytes the whole tensors have, gathered or not yet scattered."""
    whole = (value_of(member.wait if is_call(member.node, GATHER) else member.source) for member in members)
    return sum(value.numel() * value.element_size() for value in whole)


def places_of(graph: Graph) -> dict[Node, float]:
    """Where each node stands."""
    return {node: float(index) for index, node in enumerate(graph.nodes)}


def sink_waits(graph: Graph, places: dict[Node, float]) -> None:
    """Wait for every collective just before what needs it."""
    for node in graph.nodes:
        if is_call(node, "wait_tensor") and node.users:
            places[node] = max(places[node], min(places[user] for user in node.users) - 0.25)


def overlap(buckets: Mapping[str, Sequence[Bucket]], places: dict[Node, float], limit_bytes: float = float("inf")) -> None:
    """Begin each gather before the wait for the one before it, and wait for each scatter after the next has begun.

    `buckets` are gathers and scatters by the name of their operator. So a gather runs while the parameters before it are
    computed with, and a scatter while the gradients after it are computed; two together are at most `limit_bytes`.
    """
    gathers = sorted(buckets.get(GATHER, ()), key=lambda bucket: places[bucket.begin[-1]])
    for bucket in gathers:  # a merged one begins and ends at one place; between the two, the next is to begin
        for node in bucket.end:
            places[node] = max(places[node], places[bucket.begin[-1]] + 0.5)
    for before, after in pairwise(gathers):
        if before.size_bytes + after.size_bytes <= limit_bytes:
            _move(after.begin, places[before.end[0]] - 0.25, places, with_inputs=True)
    scatters = sorted(buckets.get(SCATTER, ()), key=lambda bucket: places[bucket.begin[-1]])
    for before, after in pairwise(scatters):
        if before.size_bytes + after.size_bytes <= limit_bytes:
            _move(before.end, places[after.begin[-1]] + 0.5, places)


def _move(nodes: Sequence[Node], place: float, places: dict[Node, float], *, with_inputs: bool = False) -> None:
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node.op == "placeholder":
            continue
        places[node] = min(places[node], place) if with_inputs else place
        if with_inputs:
            todo += node.all_input_nodes
