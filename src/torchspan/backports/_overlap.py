"""Buckets of FSDP's collectives in an FX graph, and an order in which they overlap with compute; for the overlap passes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchspan.core.collectives import (
    GATHER,
    SCATTER,
    Collective,
    Merged,
    is_call,
    merge_gathers,
    merge_scatters,
    origin_of,
    reorder,
    wait_for,
)
from torchspan.core.overlap import Bucket, size_of
from torchspan.core.report import current_report, user_site

_KEPT = ("partitioner_tag", "seq_nr", "autograd_backward", "nn_module_stack", "fwd_nn_module_stack", "stack_trace", "custom")


def is_fsdp_gather(node: Node) -> bool:
    """Whether `node` gathers something that is made of one graph input alone, as FSDP gathers a parameter."""
    return is_call(node, GATHER) and origin_of(node.args[0]) is not None


def is_fsdp_scatter(node: Node) -> bool:
    """Whether `node` scatters something that then only becomes graph outputs, as FSDP scatters a gradient."""
    return is_call(node, SCATTER) and all(len(user.all_input_nodes) == 1 for user in _downstream(node) if user.op != "output")


def _downstream(node: Node) -> Iterator[Node]:
    nodes, todo = {node}, [node]
    while todo:
        for user in todo.pop().users:
            if user not in nodes:
                nodes.add(user)
                todo.append(user)
                yield user


def fsdp_collectives(nodes: Iterable[Node], kind: str) -> list[Collective]:
    """FSDP's gathers or scatters among `nodes`, each with its one wait, in order."""
    is_wanted = is_fsdp_gather if kind == GATHER else is_fsdp_scatter
    pairs = ((node, wait_for(node)) for node in nodes if is_wanted(node))
    return [Collective(node, wait) for node, wait in pairs if wait is not None]


# the modules that nodes belong to


def module_paths(node: Node, traced_in: Callable[[Node], Sequence[tuple[str, Any]]] | None = None) -> list[str]:
    """The names of the modules that a node was traced in, outermost first; those of the forward for a backward node."""
    return [path for path, _ in (traced_in or module_stack)(node)]


def module_stack(node: Node) -> list[tuple[str, Any]]:
    """The name and the class of each module that tracing wrote into a node, outermost first."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    return [(plain_path(path), kind) for path, kind in stack.values()]


def plain_path(path: str) -> str:
    """The name of a module as its parent knows it, of how dynamo writes it.

    >>> plain_path("L['self']._modules['layers']._modules['0'].wq"), plain_path("L['self'].layers.0.wq")
    ('layers.0.wq', 'layers.0.wq')
    """
    path = re.sub(r"\._modules\['([^']+)'\]", r".\1", path)
    return re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", re.sub(r"^L\['\w+'\]\.?", "", path)).strip(".")


def is_inside(node: Node, names: Sequence[str], module_stack: Any = None) -> bool:
    """Whether a node was traced in one of the modules `names`, or in what they hold."""
    paths = module_paths(node, module_stack)
    return any(path == name or path.startswith(f"{name}.") for path in paths for name in names)


# merging and ordering


def merge(gm: GraphModule, groups: Sequence[Sequence[Collective]], kind: str, places: dict[Node, float]) -> list[Bucket]:
    """Merge each group of equal collectives; one of a single member stays as it is."""
    merged: list[Bucket] = []
    for group in groups:
        size = size_of(group)
        if len(group) == 1:
            merged.append(Bucket([group[0].node], [group[0].wait], size))
            continue
        at = group[0] if kind == GATHER else group[-1]
        meta = {key: value for key, value in at.node.meta.items() if key in _KEPT}
        result: Merged = (merge_gathers if kind == GATHER else merge_scatters)(gm.graph, group, places, meta)
        merged.append(Bucket(result.begin, result.end, size))
    return merged


def finish(gm: GraphModule, places: Mapping[Node, float]) -> GraphModule:
    """Put the nodes at their places, as far as they can run there."""
    reorder(gm.graph, places)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return gm


def has_waits(gm: GraphModule) -> bool:
    """Whether the graph has collectives at all."""
    return bool(gm.graph.find_nodes(op="call_function", target=torch.ops._c10d_functional.wait_tensor.default))


def say(backport: str, what: str, choice: str, reason: str) -> None:
    """Record what is done otherwise than was asked for."""
    report = current_report()
    if report is not None:
        report.decide("backport", what, f"torchspan's {backport}: {choice}", reason, user_site())
