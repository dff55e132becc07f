"""The journeys of rows to their experts and back, found in the graph of a step with expert parallelism.

Shapes, as suffixes of names: R ranks, X experts of each rank.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph as FxGraph
from torch.fx import Node

from torchspan.core.collectives import wait_for
from torchspan.passes._writer import is_aten, is_pointwise, tensor_of

EXCHANGE = "torchspan.all_to_all_rows.default"
PRODUCT = "torchspan.grouped_rows_mm.default"


@dataclass(frozen=True)
class Journey:
    """Rows to their experts and back, forward or backward: an exchange, what is computed of its rows, an exchange back.

    `rows` are the nodes in between that hold a value for each row, sorted by expert, `first` the first of them and `last` the
    last; `back` brings them into the order in which they came. `sent_RX` and `received_RX` are the numbers of rows.
    """

    dispatch: Node
    arrival: Node
    first: Node
    rows: tuple[Node, ...]
    last: Node
    back: Node
    combine: Node
    arrival_back: Node
    sent_RX: Node
    received_RX: Node

    @property
    def num_experts(self) -> int:
        """Experts of each rank."""
        counts = tensor_of(self.received_RX)
        assert counts is not None
        return int(counts.shape[1])


def find_journeys(graph: FxGraph) -> Iterator[Journey]:
    """The journeys of a graph, in the order in which they begin."""
    for node in graph.nodes:
        journey = _journey(node) if is_target(node, EXCHANGE) else None
        if journey is not None:
            yield journey


def _journey(dispatch: Node) -> Journey | None:
    """The journey that `dispatch` begins, or None."""
    _, sent_R, received_R, _, group = dispatch.args
    arrival, sent_RX, received_RX = wait_for(dispatch), summed(sent_R, 1), summed(received_R, 1)
    first = next(iter(arrival.users)) if arrival is not None and len(arrival.users) == 1 else None
    if first is None or sent_RX is None or received_RX is None or not is_aten(first, "index.Tensor"):
        return None
    order = _index(first)
    if order is None or not _sorts_by_expert(order, received_RX):
        return None
    rows = _rows_from(first, received_RX)
    for last in rows:
        for back in last.users:
            combine = next(iter(back.users)) if is_aten(back, "index.Tensor") and len(back.users) == 1 else None
            inverse = _index(back)
            if combine is None or inverse is None or not _is_argsort(inverse, order) or not is_target(combine, EXCHANGE):
                continue
            arrival_back = wait_for(combine)
            is_reverse = summed(combine.args[1], 1) is received_RX and summed(combine.args[2], 1) is sent_RX
            if arrival is None or arrival_back is None or not is_reverse or combine.args[4] != group:
                continue
            needed = _ancestors(last, rows)
            kept = tuple(node for node in rows if node in needed)
            return Journey(dispatch, arrival, first, kept, last, back, combine, arrival_back, sent_RX, received_RX)
    return None


def _rows_from(first: Node, received_RX: Node) -> list[Node]:
    """The nodes that hold a value for each row, as far as they are computed row by row, or expert by expert."""
    rows = {first: None}
    for node in nodes_after(first):
        if not any(parent in rows for parent in node.all_input_nodes):
            continue
        if is_target(node, PRODUCT):
            is_of_rows = node.args[0] in rows and summed(node.args[2], 0) is received_RX
        else:
            is_of_rows = is_pointwise(node) and all(_fits(parent, first) for parent in node.all_input_nodes)
        if is_of_rows:
            rows[node] = None
    return list(rows)


def _fits(node: Node, row: Node) -> bool:
    """Whether `node` is a matrix with as many rows as `row`."""
    value, like = tensor_of(node), tensor_of(row)
    return value is not None and like is not None and value.ndim == 2 and str(value.shape[0]) == str(like.shape[0])


def _sorts_by_expert(order: Node, received_RX: Node) -> bool:
    """Whether `order` is the order that sorts rows by expert, which come sorted by rank and, of each rank, by expert."""
    sort = order.args[0] if order.target is operator.getitem and order.args[1] == 1 else None
    if not is_aten(sort, "sort.stable") or not isinstance(sort, Node) or sort.kwargs.get("stable") is not True:
        return False
    rest = sort.args[0]
    counts = tensor_of(received_RX)
    if not is_aten(rest, "remainder.Scalar") or not isinstance(rest, Node) or counts is None:
        return False
    search = rest.args[0]
    if rest.args[1] != counts.shape[1] or not is_aten(search, "searchsorted.Tensor") or not isinstance(search, Node):
        return False
    ends = search.args[0]
    flat = ends.args[0] if is_aten(ends, "cumsum.default") and isinstance(ends, Node) else None
    is_right = search.kwargs.get("right") is True and is_aten(search.args[1], "arange.default")
    return is_right and is_aten(flat, "view.default") and isinstance(flat, Node) and flat.args[0] is received_RX


def _is_argsort(node: Node, of: Node) -> bool:
    sort = node.args[0] if node.target is operator.getitem and node.args[1] == 1 else None
    return is_aten(sort, "sort.default") and isinstance(sort, Node) and sort.args == (of,)


def _index(node: Node) -> Node | None:
    """The one index that ``node`` takes rows by."""
    indices = node.args[1] if is_aten(node, "index.Tensor") else None
    index = indices[0] if isinstance(indices, (list, tuple)) and len(indices) == 1 else None
    return index if isinstance(index, Node) else None


def summed(node: Any, dim: int) -> Node | None:
    """What `node` is the sum of along `dim`."""
    if is_aten(node, "sum.dim_IntList") and list(node.args[1:]) == [[dim]] and isinstance(node.args[0], Node):
        return node.args[0]
    return None


def is_target(node: object, target: str) -> bool:
    """Whether `node` is a node that calls `target`, such as ``torchspan.all_to_all_rows.default``."""
    return isinstance(node, Node) and str(node.target) == target


def nodes_after(node: Node) -> Iterator[Node]:
    """The nodes that stand after `node`."""
    node = node.next
    while node.op != "root":
        yield node
        node = node.next


def _ancestors(node: Node, among: Sequence[Node]) -> set[Node]:
    """`node` and those of `among`, in the order of the graph, that it is made of."""
    ancestors = {node}
    for candidate in reversed(among):
        if any(user in ancestors for user in candidate.users):
            ancestors.add(candidate)
    return ancestors
