"""FSDP in a graph: the collectives of parameters and gradients, told from all others, and merged."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from torchspan.core.collectives import (
    GATHER,
    REDUCE,
    SCATTER,
    Collective,
    Merged,
    is_call,
    merge_gathers,
    merge_reduces,
    merge_scatters,
    origin_of,
    value_of,
    wait_for,
)
from torchspan.core.errors import PassError
from torchspan.core.graph import PHASE, Graph
from torchspan.passes._phases import is_marked_after_forward
from torchspan.private import distributed

KINDS = (GATHER, SCATTER, REDUCE)
_KEPT = ("partitioner_tag", "seq_nr", "autograd_backward")


@dataclass(frozen=True)
class Member(Collective):
    """A collective that moves one parameter, or its gradient, whose name is `name`."""

    name: str

    @property
    def is_of_backward(self) -> bool:
        """Whether it is of the backward: a gather there is that of a parameter that the forward gave up."""
        return is_marked_after_forward(self.node)


def parameter_gathers(graph: Graph) -> list[Member]:
    """All-gathers of a parameter that is read where it is stored, in the order of the graph.

    A gather of anything that was computed by several inputs, or that another collective gave, is none of them.
    """
    names = {node: spec.name for node, spec in zip(graph.placeholders(), graph.inputs) if spec.kind == "parameter"}
    members: list[Member] = []
    for node in graph.module.graph.nodes:
        if is_call(node, GATHER):
            origin, wait = origin_of(node.args[0]), wait_for(node)
            if origin in names and wait is not None:
                members.append(Member(node, wait, names[origin]))
    return members


def gradient_scatters(graph: Graph) -> list[Member]:
    """Reduce-scatters whose result is, but for its shape, its dtype or a further sum over copies, a parameter's gradient."""
    return list(_gradient_collectives(graph, SCATTER))


def gradient_reduces(graph: Graph) -> list[Member]:
    """All-reduces whose result is, but for its shape or dtype, a parameter's gradient: sums over copies of the model."""
    return [member for member in _gradient_collectives(graph, REDUCE) if not _goes_on_to_move(member.wait)]


def _gradient_collectives(graph: Graph, kind: str) -> Iterator[Member]:
    gradients = graph.gradients()
    for node in graph.module.graph.nodes:
        wait = wait_for(node) if is_call(node, kind) else None
        name = _gradient_name(wait, gradients) if wait is not None else None
        if wait is not None and name is not None:
            yield Member(node, wait, name)


def _gradient_name(node: Node, gradients: dict[Node, str]) -> str | None:
    """The parameter whose gradient `node` becomes by operators that nothing else reads, or None."""
    while node not in gradients:
        users = list(node.users)
        if len(users) != 1 or users[0].op != "call_function" or len(users[0].all_input_nodes) != 1:
            return None
        node = users[0]
    return gradients[node]


def _goes_on_to_move(wait: Node) -> bool:
    """Whether a further collective takes the result: that of a norm, which tensor parallelism sums before FSDP scatters it."""
    node = wait
    while node.op == "call_function" and len(node.users) == 1:
        node = next(iter(node.users))
        if "_c10d_functional" in str(node.target):
            return True
    return False


# merging


def grouped(members: Iterable[Member], key: Callable[[Member], Hashable]) -> list[list[Member]]:
    """Members that may move together, one or more, in the order of the graph: those with equal keys, and equal `key`.

    What is gathered again for the backward moves apart from what the forward gathers: together, it would be kept meanwhile.
    """
    groups: dict[Hashable, list[Member]] = defaultdict(list)
    for member in members:
        groups[key(member), member.key, member.is_of_backward].append(member)
    return list(groups.values())


_MERGES = {GATHER: merge_gathers, SCATTER: merge_scatters, REDUCE: merge_reduces}


def merge(graph: Graph, bucket: Sequence[Member], places: dict[Node, float], module: str) -> Merged:
    """One collective in place of those of `bucket`, two or more, whose nodes say that they are of `module`."""
    kind = next(kind for kind in KINDS if is_call(bucket[0].node, kind))
    at = bucket[0].node if kind == GATHER else bucket[-1].node
    phase = {key: value for key, value in (at.meta.get("custom") or {}).items() if key == PHASE}
    meta = {key: value for key, value in at.meta.items() if key in _KEPT}
    return _MERGES[kind](graph.module.graph, bucket, places, {**meta, "custom": {"module": module, **phase}})


def of_two_ranks(reduces: Sequence[Member]) -> list[Member]:
    """Those that a merge leaves bitwise what they are: of a group of two ranks, whose sum has one order."""

    sizes = {name: distributed.group_size(name) for name in {str(member.node.args[-1]) for member in reduces}}
    return [member for member in reduces if sizes[str(member.node.args[-1])] == 2]


# what a merge claims


def check_moved(name: str, before: Graph, after: Graph) -> None:
    """Raise PassError unless there are fewer collectives or as many, and each kind moves as many numbers in each group."""
    fewer, counts = after.num_collectives(), before.num_collectives()
    for kind in fewer | counts:
        if fewer[kind] > counts[kind]:
            raise PassError(f"{name} made {fewer[kind]} {kind} of {counts[kind]}; expected no more")
    if _moved(before) != _moved(after):
        raise PassError(f"{name} changed how many numbers are moved: {_moved(before)} before, {_moved(after)} after")


def _moved(graph: Graph) -> Counter[tuple[str, Any]]:
    """How many numbers each kind of collective moves in each group."""
    moved: Counter[tuple[str, Any]] = Counter()
    for node in graph.module.graph.nodes:
        for kind in KINDS:
            if is_call(node, kind):
                moved[kind, str(node.args[-1])] += math.prod(value_of(node.args[0]).shape)
    return moved


def changed(before: Graph, after: Graph) -> str:
    """Which collectives are fewer, such as ``all_gather_into_tensor 21 → 5``; empty if none is."""
    old, new = before.num_collectives(), after.num_collectives()
    return ", ".join(f"{kind} {old[kind]} → {new[kind]}" for kind in old if old[kind] != new[kind])
