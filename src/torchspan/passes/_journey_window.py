"""When a journey of rows runs: the stretch of a graph around it, and the places of the nodes in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch.fx import Graph as FxGraph
from torch.fx import Node

from torchspan.core.collectives import is_call
from torchspan.passes._journeys import Journey
from torchspan.passes._writer import is_aten

_PRODUCTS = ("aten.mm.", "aten.bmm.", "aten.addmm.", "aten.baddbmm.", "torchspan.grouped_rows_mm", "scaled_dot_product")


@dataclass
class Steps:
    """The nodes of a journey, in the order in which they are to run: `send`, each of `compute`, `weights`, `receive`.

    Each of `compute` begins with a wait and ends with an exchange that sends rows back.
    """

    send: list[Node]
    compute: list[list[Node]]
    weights: list[Node]
    receive: list[Node]

    @staticmethod
    def of_whole(journey: Journey) -> Steps:
        """Those of a journey that stays whole."""
        compute = [journey.arrival, *journey.rows, journey.back, journey.combine]
        return Steps([journey.dispatch], [compute], [], [journey.arrival_back])


@dataclass(frozen=True)
class Window:
    """The stretch of a graph in which a journey is arranged: from place `begin`, without it, the nodes of `inside`, in order.

    `before` are those of them that the dispatch needs, `after` those that need what comes back.
    """

    journey: Journey
    begin: int
    inside: tuple[Node, ...]
    before: frozenset[Node]
    after: frozenset[Node]
    dependent: frozenset[Node]
    inside_journey: frozenset[Node]

    @staticmethod
    def around(graph: FxGraph, journey: Journey) -> Window:
        """From the last product or wait that the dispatch needs to what first joins the rows that came back with other work."""
        nodes = list(graph.nodes)
        index = {node: place for place, node in enumerate(nodes)}
        needed, begin = {journey.dispatch}, index[journey.dispatch]
        while begin > 0 and not (nodes[begin] in needed and _is_work_or_wait(nodes[begin])):
            if nodes[begin] in needed:
                needed.update(nodes[begin].all_input_nodes)
            begin -= 1
        dependent = _descendants(journey.dispatch, nodes[begin + 1 :])
        back, end = index[journey.arrival_back], len(nodes) - 1
        after, work = {journey.arrival_back}, set[Node]()
        for place in range(back + 1, len(nodes)):
            node = nodes[place]
            if any(parent in after for parent in node.all_input_nodes):
                if any(parent in work for parent in node.all_input_nodes):
                    end = place
                    break
                after.add(node)
            elif _is_work(node) or any(parent in work for parent in node.all_input_nodes):
                work.add(node)
        else:
            end = back + 1
        inside = tuple(node for node in nodes[begin + 1 : end] if node.op == "call_function")
        between = frozenset(nodes[index[journey.dispatch] : back + 1])
        return Window(journey, begin, inside, frozenset(needed), frozenset(after), frozenset(dependent), between)

    def place(self, steps: Steps, erased: set[Node], places: dict[Node, float]) -> None:
        """Give every node inside, and those of `steps`, their places."""
        steps_nodes = {*steps.send, *steps.receive, *steps.weights, *(node for part in steps.compute for node in part)}
        alive = [node for node in self.inside if node not in erased and node not in steps_nodes]
        before = [node for node in alive if node in self.before]
        after = [node for node in alive if node in self.after]
        rest = [node for node in alive if node not in self.before and node not in self.after]
        dependent = [node for node in rest if node in self.dependent]
        free = [node for node in rest if node not in self.dependent]
        operands, free = _parted(free, lambda node: node in self.inside_journey)
        begun, operands = _begun(operands)
        front, behind = (free, []) if steps.weights else _halved(free)
        sooner, later = _begun(dependent)
        order = [*before, *steps.send, *begun, *front, *operands]
        for part in steps.compute:
            order += part
        order += [*steps.weights, *behind, *sooner, *steps.receive, *later, *after]
        for step, node in enumerate(order):
            places[node] = self.begin + (step + 1) / (len(order) + 1)


def _is_work(node: Node) -> bool:
    return node.op == "call_function" and any(name in str(node.target) for name in _PRODUCTS)


def _is_work_or_wait(node: Node) -> bool:
    return _is_work(node) or is_call(node, "wait_tensor") or is_aten(node, "_local_scalar_dense.default")


def _parted(nodes: Iterable[Node], condition: Callable[[Node], bool]) -> tuple[list[Node], list[Node]]:
    parts: tuple[list[Node], list[Node]] = ([], [])
    for node in nodes:
        parts[not condition(node)].append(node)
    return parts


def _begun(nodes: Sequence[Node]) -> tuple[list[Node], list[Node]]:
    """Those of `nodes` that need no wait among them, so that what they send is sent; and the others."""
    late: dict[Node, None] = {}
    for node in nodes:
        if is_call(node, "wait_tensor") or any(parent in late for parent in node.all_input_nodes):
            late[node] = None
    return _parted(nodes, lambda node: node not in late)


def _halved(nodes: Sequence[Node]) -> tuple[list[Node], list[Node]]:
    """`nodes` cut after the product with which at least half of their products are done."""
    total, done = sum(map(_is_work, nodes)), 0
    for place, node in enumerate(nodes):
        done += _is_work(node)
        if total and 2 * done >= total:
            return [*nodes[: place + 1]], [*nodes[place + 1 :]]
    return [*nodes], []


def _descendants(node: Node, among: Sequence[Node]) -> set[Node]:
    """`node` and those of `among`, in the order of the graph, that are made of it."""
    descendants = {node}
    for candidate in among:
        if any(parent in descendants for parent in candidate.all_input_nodes):
            descendants.add(candidate)
    return descendants
