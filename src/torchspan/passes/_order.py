"""Put the nodes of a graph in an order in which they can run, as near as possible to a wanted one."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from itertools import pairwise

from torch.fx import Graph, Node

from torchspan.core.errors import PassError


def reorder(graph: Graph, wanted: Mapping[Node, float]) -> None:
    """Sort `graph` topologically, in place; of nodes that can run, the one with the lowest `wanted` place runs first.

    Nodes that `wanted` leaves out keep the place they have. PassError if nodes wait for each other.
    """
    nodes = list(graph.nodes)
    rank = {node: (wanted.get(node, float(index)), index) for index, node in enumerate(nodes)}
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
