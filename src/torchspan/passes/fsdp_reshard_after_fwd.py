"""Reshard after forward, in a graph: a gathered parameter is gathered again for the backward, and not kept meanwhile."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from torchspan.core.collectives import value_of
from torchspan.core.errors import PassError
from torchspan.core.graph import PHASE, Graph
from torchspan.passes._base import Pass, PassContext, Stage, editable, refuse_writes
from torchspan.passes._blocks import block_of, part_of, patterns_of
from torchspan.passes._fsdp import Member, parameter_gathers
from torchspan.passes._phases import nodes_after_forward

_COPIES = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default, torch.ops.aten._unsafe_view.default)


@dataclass(frozen=True)
class FsdpReshardAfterFwd(Pass):
    """Gathers a parameter a second time, just before the backward first reads it, so that it is not kept from the forward on.

    `modules` are patterns of submodule paths whose parameters are meant (``*.feed_forward``, several by ``|``); all, if it is
    empty. With `keep_last`, what the forward gathers from the last block on stays, as the backward begins there. Numbers stay
    bitwise what they were. Passes that merge gathers keep those of the backward apart. What
    ``--parallelism.reshard_after_forward always`` does to the program, this does to its graph, a joint graph too.
    """

    name: ClassVar[str] = "fsdp_reshard_after_fwd"
    summary: ClassVar[str] = "gathers FSDP's parameters again in the backward, in place of keeping them: less memory"
    stage: ClassVar[Stage] = "memory"

    modules: str = ""
    keep_last: bool = False

    def require(self, graph: Graph) -> None:
        if graph.kind == "forward":
            raise PassError(f"{self.name} needs a graph with a backward; expected one of kind train_step or joint, not forward")
        refuse_writes(self.name, graph)
        gathers = _of_forward(graph)
        if self.modules and gathers and not self._meant(gathers):
            first = gathers[0].name
            raise PassError(
                f"{self.name}: no parameter that is gathered is of a module that answers to {self.modules!r}; there is {first}"
            )

    def run(self, graph: Graph, context: PassContext) -> Graph:
        module = editable(graph)
        result = graph.with_module(module, str(self))
        num_again = 0
        later = nodes_after_forward(result.module.graph)
        index = {node: i for i, node in enumerate(module.graph.nodes)}
        for gather in self._meant(_of_forward(result)):
            read = _read_later(gather, later)
            if read:
                _gather_again(gather, read, later, index)
                num_again += 1
        module.graph.lint()
        module.recompile()
        self._record(graph, result, num_again, context)
        return result

    def ensure(self, before: Graph, after: Graph) -> None:
        """Nothing that was meant is kept, and only gathers were added."""
        later = nodes_after_forward(after.module.graph)
        kept = [gather.name for gather in self._meant(_of_forward(after)) if _read_later(gather, later)]
        if kept:
            raise PassError(f"{self.name} left {len(kept)} gathered parameters to be kept for the backward, first {kept[0]}")
        num, num_before = after.num_collectives(), before.num_collectives()
        added = num - num_before
        if num_before - num or set(added) - {"all_gather_into_tensor"}:
            raise PassError(
                f"{self.name} changed other collectives than all-gathers: {dict(num_before)} before, {dict(num)} after"
            )

    def _meant(self, gathers: Sequence[Member]) -> list[Member]:
        """Those of `gathers` that this pass is asked to gather again."""
        blocks = [block_of(gather.name) for gather in gathers]
        last = next((block for block in reversed(blocks) if block is not None), None)
        end = blocks.index(last) if self.keep_last and last is not None else len(gathers)
        return [gather for gather in gathers[:end] if answers(gather.name, self.modules)]

    def _record(self, before: Graph, after: Graph, num_again: int, context: PassContext) -> None:
        old, new = kept_bytes(before), kept_bytes(after)
        if num_again:
            what = f"{num_again} parameters gathered again, {old - new} bytes not kept"
            reason = f"of gathered parameters, the backward found {old} bytes kept from the forward, and finds {new}"
        else:
            what, reason = "nothing changed", "no gathered parameter that is meant is read by the backward"
        context.report.decide("pass", self.name, what, reason)


def answers(name: str, patterns: str) -> bool:
    """Whether the parameter `name` is of a module whose path, or that of one around it, answers to one of `patterns`.

    >>> answers("layers.0.attention.wq.weight", "*.attention | *.norm"), answers("layers.0.w1.weight", "*.attention")
    (True, False)
    """
    globs = patterns_of(patterns)
    return not globs or part_of(name.rpartition(".")[0], globs) is not None


def kept_bytes(graph: Graph) -> int:
    """How many bytes of gathered parameters are kept from the forward for what comes after: each tensor in memory once."""
    later = nodes_after_forward(graph.module.graph)
    owners = {_owner(node) for gather in _of_forward(graph) for node in _read_later(gather, later)}
    return sum(value_of(node).numel() * value_of(node).element_size() for node in owners)


def _of_forward(graph: Graph) -> list[Member]:
    return [gather for gather in parameter_gathers(graph) if not gather.is_of_backward]


def _read_later(gather: Member, later: set[Node]) -> list[Node]:
    """What the forward made of a gathered parameter alone, views and copies, that nodes of `later` read."""
    nodes, todo = [], [gather.wait]
    while todo:
        node = todo.pop()
        if any(user in later for user in node.users):
            nodes.append(node)
        todo += [user for user in node.users if user not in later and (_is_view(user) or user.target in _COPIES)]
    return nodes


def _is_view(node: Node) -> bool:
    """Whether a node gives a view of its one input, or one of several views."""
    if node.op != "call_function" or len(node.all_input_nodes) != 1:
        return False
    if node.target is operator.getitem:
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and not schema.is_mutable and all(result.alias_info is not None for result in schema.returns)


def _owner(node: Node) -> Node:
    """The node that made the memory in which the value of `node` lies."""
    while _is_view(node) or node.target is torch.ops.aten._unsafe_view.default:
        node = node.all_input_nodes[0]
    return node


def _gather_again(gather: Member, read: Sequence[Node], later: set[Node], index: dict[Node, int]) -> None:
    """Copy what leads from the stored parameter to each node of `read` to where it is first read later, to be read there."""
    users = [user for node in read for user in node.users if user in later]
    copies: dict[Node, Node] = {}
    with gather.node.graph.inserting_before(min(users, key=index.__getitem__)):
        for node in read:
            again = _copy(node, copies)
            for user in [user for user in node.users if user in later]:
                user.replace_input_with(node, again)
    later.update(copies.values())
    index.update({copy: index[node] for node, copy in copies.items()})


def _copy(node: Node, copies: dict[Node, Node]) -> Node:
    """A copy of `node`, and of what it is made of, marked as of the backward; stored parameters are no copies."""
    if node.op == "placeholder":
        return node
    if node not in copies:
        parents = {parent: _copy(parent, copies) for parent in node.all_input_nodes}
        copies[node] = node.graph.node_copy(node, parents.__getitem__)
        copies[node].meta = _of_backward(node.meta)
    return copies[node]


def _of_backward(meta: dict[str, Any]) -> dict[str, Any]:
    marks = {"custom": {**(meta.get("custom") or {}), PHASE: "backward"}, "autograd_backward": True}
    return {**meta, **marks, **({"partitioner_tag": "is_backward"} if "partitioner_tag" in meta else {})}


PASS = FsdpReshardAfterFwd
