"""Whether what a compiler made of an entry's graphs gives the numbers of their operators, on the example inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from torchspan.artifacts.instructions import WITH_WORKSPACE
from torchspan.artifacts.loading import open_runners
from torchspan.artifacts.manifest import FORMAT
from torchspan.artifacts.size_conditions import example_of, is_size
from torchspan.core.errors import CompileError
from torchspan.core.graph import output_node
from torchspan.core.numerics import but_rounding, difference


@dataclass
class Parts:
    """What one entry consists of: its line in the manifest, and its payloads by name."""

    program: dict[str, Any]
    payloads: dict[str, bytes] = field(default_factory=dict)
    format: int = FORMAT


def check_numbers(
    graphs: Mapping[str, GraphModule | None],
    plan: Mapping[str, Any],
    parts: Parts,
    inputs: Sequence[Any],
    symbols: Mapping[str, int],
    name: str,
) -> None:
    """Run the forward and the backward compiled and operator by operator, and raise CompileError where they differ.

    The tangents of the backward are drawn; nothing of random numbers is left changed.
    """
    examples = [example_of(value) if is_size(value) else value.detach() for value in inputs]
    dtypes = tuple(set().union(*(_dtypes_of(graph) for graph in graphs.values() if graph is not None)))
    forward_graph, backward_graph = graphs["forward"], graphs["backward"]
    with TemporaryDirectory(prefix="torchspan-") as folder, torch.random.fork_rng(devices=()), torch.no_grad():
        forward, backward = open_runners(plan, parts.program, parts.payloads, Path(folder))
        actual, expected = _both(forward, forward_graph, examples, symbols)
        num_results = len(plan["mutated"]) + len(plan["outputs"]) + plan["num_bases"]
        steady = [index < num_results or _is_steady(value) for index, value in enumerate(expected)]
        steady_actual, steady_expected = (
            [value for value, is_kept in zip(values, steady) if is_kept] for values in (actual, expected)
        )
        _refuse(difference(steady_actual, steady_expected, *dtypes), f"the forward of {name}")
        if backward_graph is not None:
            arguments = _arguments(backward_graph, _named(forward_graph, expected))
            actual, expected = _both(backward, backward_graph, arguments, symbols)
            _refuse(difference(*but_rounding(actual, expected, *dtypes), *dtypes, name="gradient"), f"the backward of {name}")


def _dtypes_of(graph: GraphModule) -> set[torch.dtype]:
    """The dtypes that a computation passes through: with autocast inside, inputs and outputs do not show them."""
    values = [value for node in graph.graph.nodes for value in pytree.tree_leaves(node.meta.get("val"))]
    return {value.dtype for value in values if isinstance(value, torch.Tensor)}


def _both(runner: Any, graph: Any, inputs: Sequence[Any], symbols: Mapping[str, int]) -> tuple[list[Any], list[Any]]:
    """What was compiled and what the operators give, from the same random numbers."""
    state = torch.get_rng_state()
    actual = runner([value for value in inputs if isinstance(value, torch.Tensor)], symbols)
    torch.set_rng_state(state)
    needs_workspace = any(str(node.target) in WITH_WORKSPACE for node in graph.graph.nodes)
    with torch.set_grad_enabled(needs_workspace):
        return actual, list(map(_detached, graph(*inputs)))


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _is_steady(value: Any) -> bool:
    """Whether rounding changes a saved value by little; it may flip an integer, such as where an activation is positive."""
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def _refuse(differs: str | None, what: str) -> None:
    if differs is not None:
        raise CompileError(
            f"{what}, compiled, gives other numbers than its operators on the example inputs: {differs}. Compile it with "
            "compiler='eager', or with verify=False if it is the example that has no stable numbers"
        )


def _named(graph: Any, values: Sequence[Any]) -> dict[str, Any]:
    """What a graph gave, by the name of the node that computed it."""
    nodes = output_node(graph.graph).args[0]
    return {node.name: value for node, value in zip(nodes, values) if isinstance(node, torch.fx.Node)}


def _arguments(graph: GraphModule, saved: Mapping[str, Any]) -> list[Any]:
    """What a backward takes: what was saved, sizes, and drawn gradients for the rest."""
    arguments = []
    for node in graph.graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta["val"]
        if node.name in saved:
            arguments.append(saved[node.name])
        elif is_size(value):
            arguments.append(example_of(value))
        else:
            shape, stride = (list(map(example_of, sizes)) for sizes in (value.shape, value.stride()))
            like = torch.empty_strided(shape, stride, dtype=value.dtype)
            arguments.append(like.copy_(torch.randn(shape, dtype=value.dtype)))
    return arguments
