"""Writes nodes into a graph that a pass edits, each with the value that it has for the values of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from torchspan.core.graph import GRADIENT_OF
from torchspan.private.fx import fake_mode_of, forget_new_sizes

_KEPT = ("custom", "partitioner_tag", "seq_nr", "autograd_backward", "stack_trace", "nn_module_stack")


class Writer:
    """Writes before the node `at`, with the metadata of the node that what it writes stands for.

    Example values are computed where the graph's own are, so that no size of one batch slips in.
    """

    def __init__(self, graph: Graph, at: Node) -> None:
        self._graph, self._at = graph, at
        self._mode: Any = fake_mode_of([node.meta.get("val") for node in graph.nodes if node.op == "placeholder"])
        self.meta: Mapping[str, Any] = {}
        self._nodes: list[Node] = []

    def like(self, node: Node) -> Writer:
        """Give what is written from here on the place in the model that `node` has."""
        self.meta = {key: node.meta[key] for key in _KEPT if key in node.meta}
        return self

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """Write a call."""
        with self._graph.inserting_before(self._at):
            node = self._graph.call_function(target, args, kwargs)
        known, named = map_arg((args, kwargs), lambda argument: argument.meta["val"])
        with self._mode or nullcontext():
            value = target(*known, **named)
        node.meta = {**self.meta, "val": value}
        self._nodes.append(node)
        return node

    def again(self, node: Node, replaced: Mapping[Node, Any]) -> Node:
        """Write the call of `node` with other arguments, for those that `replaced` has."""
        args, kwargs = map_arg((node.args, node.kwargs), lambda argument: replaced.get(argument, argument))
        assert callable(node.target), f"{node.name} calls no function"
        return self.like(node)(node.target, *args, **kwargs)

    def number(self, tensor: Node, least: int, most: Any) -> Node:
        """The whole number that the tensor `tensor` of one element has, from `least` to `most`."""
        node = self(torch.ops.aten._local_scalar_dense.default, tensor)
        size = node.meta["val"]
        torch._check(size >= least)
        torch._check(size <= (most.meta["val"] if isinstance(most, Node) else most))
        node.meta["unbacked_bindings"] = forget_new_sizes(self._mode, size)
        return node

    def taken(self) -> list[Node]:
        """What was written since this was asked last."""
        written, self._nodes = self._nodes, []
        return written


def replace_whole(node: Node, whole: Node) -> None:
    """Let `whole` stand for `node`, which is erased; as a gradient too."""
    if GRADIENT_OF in node.meta:
        whole.meta[GRADIENT_OF] = node.meta[GRADIENT_OF]
    node.replace_all_uses_with(whole)
    node.graph.erase_node(node)


def is_aten(node: object, name: str) -> bool:
    """Whether `node` calls the operator ``aten.<name>``, such as ``sum.dim_IntList``."""
    return isinstance(node, Node) and node.op == "call_function" and str(node.target) == f"aten.{name}"


_POINTWISE = frozenset(("silu_backward.default", "_to_copy.default", "clone.default"))
"""Operators of one element after another that torch does not mark as such on every release."""


def is_pointwise(node: Node) -> bool:
    """Whether `node` computes each element of its result from the elements at that place alone."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in node.target.tags or str(node.target).removeprefix("aten.") in _POINTWISE


def tensor_of(node: object) -> Tensor | None:
    """The example value of a node, where it is a tensor."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None
