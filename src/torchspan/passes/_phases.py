"""Phases: which nodes of a training step are its forward, which its backward, and which its optimizer."""

from __future__ import annotations

from typing import Literal

from torch.fx import Graph as FxGraph
from torch.fx import Node

from torchspan.core.graph import PHASE

Phase = Literal["forward", "backward", "optimizer"]


def phases_of(graph: FxGraph) -> dict[Node, Phase]:
    """The phase of each node, placeholders among them: those of tangents are the backward's, all others the forward's.

    Told by what the captures write: ``custom["phase"]`` (train_step, and what a pass has moved), ``partitioner_tag`` (joint),
    ``autograd_backward`` (torch since 2.10). A node without such a mark is of the latest phase among the nodes that it reads.
    """
    order: tuple[Phase, ...] = ("forward", "backward", "optimizer")
    phases: dict[Node, Phase] = {}
    for node in graph.nodes:
        phase = _said(node)
        read = [order.index(phases[source]) for source in node.all_input_nodes]
        phases[node] = order[max([order.index(phase), *read])]
    return phases


def nodes_after_forward(graph: FxGraph) -> set[Node]:
    """The nodes of the backward and of the optimizer; the output is of neither."""
    return {node for node, phase in phases_of(graph).items() if phase != "forward" and node.op != "output"}


def is_marked_after_forward(node: Node) -> bool:
    """Whether the metadata of `node` itself say that it is of the backward or of the optimizer."""
    return _said(node) != "forward"


def _said(node: Node) -> Phase:
    """What the node's own metadata say."""
    phase = (node.meta.get("custom") or {}).get(PHASE)
    if phase in ("backward", "optimizer"):
        return phase
    is_tangent = node.op == "placeholder" and type(node.meta.get("desc")).__name__ == "TangentAOTInput"
    is_tagged = str(node.meta.get("partitioner_tag", "")).endswith("backward")
    return "backward" if is_tangent or is_tagged or node.meta.get("autograd_backward") else "forward"


def mark_backward(node: Node) -> None:
    """Write on `node`, which a pass made, that it is a part of the backward."""
    node.meta["custom"] = {**(node.meta.get("custom") or {}), PHASE: "backward"}
    if "partitioner_tag" in node.meta:
        node.meta["partitioner_tag"] = "is_backward"
