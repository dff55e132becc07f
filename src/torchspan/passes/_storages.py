"""Storages: which nodes share the memory of one tensor, how many bytes it has, and what is kept for the backward."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph as FxGraph
from torch.fx import Node

from torchspan.core.graph import output_node
from torchspan.passes._phases import Phase

# they return the memory that they are given, and do not say so in their schema
_SILENT_VIEWS = ("aten._unsafe_view.default", "_c10d_functional.wait_tensor.default", "torchspan.wait_for_copy.default")


def viewed_by(node: Node) -> Node | None:
    """The node whose memory `node` returns, whole or in part; None if it makes its own."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        parent = node.args[0]
        assert isinstance(parent, Node)
        return parent if viewed_by(parent) is not None else None  # a piece of a split
    if str(node.target) in _SILENT_VIEWS:
        return _node(node.args[0])
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.is_mutable or not any(value.alias_info for value in schema.returns):
        return None
    values = [*node.args, *(node.kwargs.get(argument.name) for argument in schema.arguments[len(node.args) :])]
    return next((_node(value) for argument, value in zip(schema.arguments, values) if argument.alias_info), None)


def _node(value: Any) -> Node | None:
    return value if isinstance(value, Node) else None


def owner_of(node: Node) -> Node:
    """The node that made the memory in which the value of `node` is; for one of several results, its first ``getitem``."""
    while (viewed := viewed_by(node)) is not None:
        node = viewed
    if node.target is operator.getitem:
        parent, index = node.args
        assert isinstance(parent, Node)
        return next(user for user in parent.users if user.target is operator.getitem and user.args[1] == index)
    return node


def producer_of(owner: Node) -> Node:
    """The node that computes what `owner` holds: itself, or what gave several results."""
    return owner.args[0] if owner.target is operator.getitem else owner  # type: ignore[return-value]


def num_bytes_of(owner: Node) -> int | None:
    """The bytes of the memory that `owner` made; 0 if it holds no tensor, None if a size depends on data."""
    value = owner.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    sizes, strides = [*value.shape], [*value.stride()]
    if not all(isinstance(number, int) for number in (*sizes, *strides)):
        return None
    if 0 in sizes:
        return 0
    return (sum((size - 1) * stride for size, stride in zip(sizes, strides)) + 1) * value.element_size()


def kept_for_backward(graph: FxGraph, phases: Mapping[Node, Phase]) -> list[Node]:
    """What the graph has made and still needs, or returns, when the backward begins: the owners, in order.

    These are the bytes that are held from the forward to the backward; what the graph is given is not among them.
    """
    place = {node: index for index, node in enumerate(graph.nodes)}
    border = min(
        (place[node] for node, phase in phases.items() if phase != "forward" and node.op != "placeholder"), default=None
    )
    if border is None:
        return []
    kept = {
        owner_of(read): None
        for node in list(graph.nodes)[border:]
        for read in node.all_input_nodes
        if place[read] < border and read.op == "call_function"
    }
    return sorted((owner for owner in kept if owner.op == "call_function"), key=place.__getitem__)


def returned_by(graph: FxGraph) -> set[Node]:
    """The owners of what a graph returns."""
    return {owner_of(node) for node in output_node(graph).all_input_nodes}


def total_bytes(owners: list[Node]) -> tuple[int, int]:
    """The bytes of all, and how many have a size that depends on data and are not counted."""
    sizes = [num_bytes_of(owner) for owner in owners]
    return sum(size for size in sizes if size is not None), sizes.count(None)
