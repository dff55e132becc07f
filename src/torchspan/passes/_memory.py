"""Memory of a graph's values: which share it, and who reads it after it was written in place; told by operators' schemas.

Each result of a submodule or of a higher-order operator is taken to be in memory of its own.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from itertools import combinations
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from torchspan.core.errors import GraphError
from torchspan.core.graph import Graph
from torchspan.passes._values import shown_node

_WAIT = "_c10d_functional.wait_tensor.default"
Roots = dict[Node, frozenset[Node]]
Read = tuple[str, str, str]
"""A read of memory that was written in place meanwhile: the write, the value through which it is read, the reader."""


def check_aliases(before: Graph, after: Graph) -> None:
    """Raise GraphError for an output that shares memory with an input or with another output, where it did not before."""
    old, new = set(_shared_outputs(before)), list(_shared_outputs(after))
    for pair in new:
        if pair not in old:
            first, other = pair
            raise GraphError(
                f"output {first}, {_output_of(after, first)}, shares memory with {_described(after, other)}, which it did not "
                "before; expected memory of its own: clone it"
            )


def check_writes(before: Graph, after: Graph) -> None:
    """Raise GraphError for a write in place that changes what is read.

    That is a write into an input, or before a read that it did not come before, or after one that it came before.
    """
    if not _writes(after) and not _writes(before):
        return
    was_written = {(write, root) for write, root, _ in _inputs_written(before)}
    for write, root, node in _inputs_written(after):
        if (write, root) not in was_written:
            raise GraphError(f"{shown_node(node)} writes into the input {root}; expected it to write into what the graph made")
    old, new = set(_reads_after_writes(before)), set(_reads_after_writes(after))
    names = {node.name: node for node in before.module.graph.nodes}
    nodes = {node.name: node for node in after.module.graph.nodes}
    for write, value, reader in sorted(new - old):
        if reader in names and value in names:
            raise GraphError(
                f"{shown_node(nodes[write])} writes in place into {value}, which {shown_node(nodes[reader])} reads later, and "
                "read unwritten before; expected the write after its last reader, or a value of its own"
            )
    for write, value, reader in sorted(old - new):
        if write in nodes and reader in nodes and value in nodes and nodes[value] in nodes[reader].all_input_nodes:
            raise GraphError(
                f"{shown_node(nodes[reader])} reads {value} before {shown_node(nodes[write])} writes into it, and read what "
                "was written before; expected the same order"
            )


# which values share memory


def roots_of(graph: Graph) -> Roots:
    """For each node, the nodes in whose memory its value may lie: itself, or what it is a view of."""
    roots: Roots = {}
    for node in graph.module.graph.nodes:
        viewed = _viewed(node)
        roots[node] = frozenset().union(*(roots[source] for source in viewed)) if viewed else frozenset((node,))
    return roots


def _viewed(node: Node) -> list[Node]:
    """The nodes whose memory the result of `node` may share."""
    if node.op != "call_function":
        return []
    if node.target is operator.getitem:
        return [node.args[0]] if isinstance(node.args[0], Node) and _viewed(node.args[0]) else []
    if str(node.target) == _WAIT:
        return [node.args[0]] if isinstance(node.args[0], Node) else []
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    viewed, _ = _memory_of(node.target)
    return _arguments(node, viewed)


@cache
def _memory_of(target: torch._ops.OpOverload) -> tuple[tuple[tuple[int, str], ...], tuple[tuple[int, str], ...]]:
    """The arguments, by place and name, whose memory an operator may give back, and those that it writes into."""
    schema = target._schema
    gives_back = any(value.alias_info is not None for value in schema.returns)
    aliased = [
        (i, argument.name, argument.alias_info)
        for i, argument in enumerate(schema.arguments)
        if argument.alias_info is not None
    ]
    return (
        tuple((i, name) for i, name, _ in aliased if gives_back),
        tuple((i, name) for i, name, info in aliased if info.is_write),
    )


def _arguments(node: Node, which: tuple[tuple[int, str], ...]) -> list[Node]:
    nodes: list[Node] = []
    for index, name in which:
        value: Any = node.args[index] if index < len(node.args) else node.kwargs.get(name)
        map_arg(value, nodes.append)
    return nodes


def _shared_outputs(graph: Graph) -> Iterator[tuple[int, int | str]]:
    """Each output that shares memory with an input (by name) or a later output (by place)."""
    roots = roots_of(graph)
    by_root: dict[Node, list[int]] = defaultdict(list)
    values = graph.output_values()
    for index, value in enumerate(values):
        if isinstance(value, Node):
            for root in roots[value]:
                by_root[root].append(index)
    for root, outputs in by_root.items():
        if root.op == "placeholder":
            yield from ((index, root.name) for index in outputs)
        spans = {index: _span(values[index]) for index in outputs}
        yield from (pair for pair in combinations(outputs, 2) if _may_overlap(spans[pair[0]], spans[pair[1]]))


def _span(value: Node) -> tuple[int, int] | None:
    """Where a value begins and ends in its memory, in elements; None where that cannot be told."""
    example = value.meta.get("val")
    if not isinstance(example, torch.Tensor) or example.layout is not torch.strided:
        return None
    numbers = (example.storage_offset(), *example.shape, *example.stride())
    if not all(type(number) is int for number in numbers):
        return None
    last = sum((size - 1) * stride for size, stride in zip(example.shape, example.stride()))
    return numbers[0], numbers[0] + (last + 1 if 0 not in example.shape else 0)


def _may_overlap(first: tuple[int, int] | None, second: tuple[int, int] | None) -> bool:
    """Whether two parts of the same memory may have an element in common; parts of a bucket have none."""
    return first is None or second is None or (first[0] < second[1] and second[0] < first[1])


def _output_of(graph: Graph, index: int) -> str:
    spec, value = graph.outputs[index], graph.output_values()[index]
    return f"the {spec.kind} {spec.name} ({value.name})"


def _described(graph: Graph, other: int | str) -> str:
    if isinstance(other, int):
        return f"output {other}, {_output_of(graph, other)}"
    specs = {node.name: spec for node, spec in zip(graph.placeholders(), graph.inputs)}
    return f"the {specs[other].kind} {specs[other].name} ({other})"


# writes


def _writes(graph: Graph) -> list[tuple[Node, list[Node]]]:
    """Each node that writes in place, with what it writes into."""
    writes = []
    for node in graph.module.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            writes.append((node, _arguments(node, _memory_of(node.target)[1])))
    return writes


def _inputs_written(graph: Graph) -> Iterator[tuple[str, str, Node]]:
    roots = roots_of(graph)
    for node, into in _writes(graph):
        for root in frozenset().union(*(roots[target] for target in into)):
            if root.op == "placeholder":
                yield node.name, root.name, node


def _reads_after_writes(graph: Graph) -> Iterator[Read]:
    """Each read through a value that is older than a write into its memory."""
    roots = roots_of(graph)
    place = {node: index for index, node in enumerate(graph.module.graph.nodes)}
    sharing: dict[Node, list[Node]] = defaultdict(list)
    for node, memory in roots.items():
        for root in memory:
            sharing[root].append(node)
    for write, into in _writes(graph):
        for root in frozenset().union(*(roots[target] for target in into)):
            for value in sharing[root]:
                if place[value] < place[write]:
                    yield from ((write.name, value.name, user.name) for user in value.users if place[user] > place[write])
