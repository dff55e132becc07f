"""Let FSDP's gathers and scatters run beside each other: parameters and gradients move in process groups of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from torchspan.core.collectives import GATHER, REDUCE, SCATTER, is_call
from torchspan.core.errors import PassError
from torchspan.core.graph import Graph
from torchspan.passes._base import Pass, PassContext, Stage, editable
from torchspan.passes._groups import create_named_groups, name_of
from torchspan.private import distributed

PARAMETERS, GRADIENTS = "parameters", "gradients"


@dataclass(frozen=True)
class SeparateProcessGroups(Pass):
    """Gives gathers of parameters, and what sums up gradients, process groups of the same ranks that nothing else talks in.

    On NCCL each group has a stream of its own, so that the gather of what comes next, the scatter of what was, and tensor or
    expert parallelism need not wait for each other; on gloo it changes nothing that can be seen. Numbers stay bitwise what they
    were. With `parameters` or `gradients` false, that half keeps its groups. A group's name says what it is for and which ranks
    it has, so that a graph which was saved can run in another job. Each rank of the job must run this pass at the same time, as
    ``torchspan train`` does: groups are made together.
    """

    name: ClassVar[str] = "separate_process_groups"
    summary: ClassVar[str] = "parameters and gradients move in process groups of their own, and so overlap on NCCL"
    stage: ClassVar[Stage] = "communication"
    after: ClassVar[tuple[str, ...]] = ("autobucketing_reordering", "transformer_block_bucketing")

    parameters: bool = True
    gradients: bool = True

    def run(self, graph: Graph, context: PassContext) -> Graph:
        module = editable(graph)
        result = graph.with_module(module, str(self))
        purposes = self._wanted(result)
        names = _names(purposes)
        for node, purpose in purposes.items():
            node.args = (*node.args[:-1], names[purpose, str(node.args[-1])])
        create_named_groups(result)
        module.recompile()
        self._record(purposes, set(names.values()), context)
        return result

    def ensure(self, before: Graph, after: Graph) -> None:
        """The same collectives in the same order."""
        old, new = (_collectives(graph) for graph in (before, after))
        if [str(node.target) for node in old] != [str(node.target) for node in new]:
            raise PassError(f"{self.name} changed which collectives are called, or their order; expected their groups alone")

    def _wanted(self, graph: Graph) -> dict[Node, str]:
        """The collectives that get another group, with what they move."""
        parameters = _made_of_parameters(graph) if self.parameters else set()
        gradients = _becoming_gradients(graph) if self.gradients else set()
        purposes: dict[Node, str] = {}
        for node in graph.module.graph.nodes:
            if is_call(node, GATHER) and node.args[0] in parameters:
                purposes[node] = PARAMETERS
            elif (is_call(node, SCATTER) or is_call(node, REDUCE)) and node in gradients:
                purposes[node] = GRADIENTS
        return purposes

    def _record(self, purposes: Mapping[Node, str], names: set[str], context: PassContext) -> None:
        if not purposes:
            context.report.decide("pass", self.name, "nothing changed", "no parameter is gathered and no gradient summed up")
            return
        num = {purpose: sum(kind == purpose for kind in purposes.values()) for purpose in (PARAMETERS, GRADIENTS)}
        what = f"{num[PARAMETERS]} gathers of parameters, {num[GRADIENTS]} sums of gradients in groups of their own"
        context.report.decide("pass", self.name, what, f"groups: {', '.join(sorted(names))}")


def _names(purposes: Mapping[Node, str]) -> dict[tuple[str, str], str]:
    """The name of each new group, by what moves in it and the group that it stands for."""

    pairs = dict.fromkeys((purpose, str(node.args[-1])) for node, purpose in purposes.items())
    missing = [group for _, group in pairs if distributed.find_group(group) is None]
    if missing:
        raise PassError(
            f"separate_process_groups: the graph talks in the group {missing[0]!r}, which this process does not have; "
            "run it in the job that the graph was captured in"
        )
    return {(purpose, group): name_of(purpose, distributed.group_ranks(group)) for purpose, group in pairs}


def _collectives(graph: Graph) -> list[Node]:
    return [node for node in graph.module.graph.nodes if any(is_call(node, kind) for kind in (GATHER, SCATTER, REDUCE))]


def _made_of_parameters(graph: Graph) -> set[Node]:
    """Stored parameters, and what is made of them alone, without other ranks."""
    nodes = {node for node, spec in zip(graph.placeholders(), graph.inputs) if spec.kind == "parameter"}
    for node in graph.module.graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "call_function" and inputs and nodes.issuperset(inputs) and "_c10d_functional" not in str(node.target):
            nodes.add(node)
    return nodes


def _becoming_gradients(graph: Graph) -> set[Node]:
    """Gradients, and nodes whose values only become gradients, by operators that take no other tensor."""
    nodes = set(graph.gradients())
    for node in reversed(graph.module.graph.nodes):
        if node.op == "call_function" and node.users and all(user in nodes and _only_moves(user) for user in node.users):
            nodes.add(node)
    return nodes


def _only_moves(node: Node) -> bool:
    """Whether a node takes one tensor, or puts several side by side."""
    return len(node.all_input_nodes) == 1 or str(node.target) == "aten.cat.default"


PASS = SeparateProcessGroups
