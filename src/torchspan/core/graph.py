"""Graph: an FX GraphModule and its signature; it verifies itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node

from torchspan.core.errors import GraphError

InputKind = Literal["parameter", "buffer", "input", "tangent"]
OutputKind = Literal["output", "loss", "gradient", "saved", "mutation"]


def output_node(graph: FxGraph) -> Any:
    """The node that returns a graph's results."""
    return next(node for node in reversed(graph.nodes) if node.op == "output")


@dataclass(frozen=True)
class InputSpec:
    """What one placeholder stands for: its `kind`, and the `name` by which the program knows it."""

    kind: InputKind
    name: str


@dataclass(frozen=True)
class OutputSpec:
    """What one output stands for; a gradient or mutation carries the name of what it belongs to."""

    kind: OutputKind
    name: str


@dataclass(frozen=True)
class Graph:
    """An FX GraphModule with a flat signature: one InputSpec a placeholder, one OutputSpec an output, in order.

    `kind` is ``forward``, ``joint`` or ``train_step``. `notes` are the passes that have run.
    """

    module: GraphModule
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    kind: Literal["forward", "joint", "train_step"] = "forward"
    notes: tuple[str, ...] = field(default=())

    def placeholders(self) -> list[Node]:
        """The placeholder nodes, in order."""
        return [node for node in self.module.graph.nodes if node.op == "placeholder"]

    def output_values(self) -> list[Any]:
        """What the output node returns, flat, in order."""
        value = output_node(self.module.graph).args[0]
        return list(value) if isinstance(value, (tuple, list)) else [value]

    def count_targets(self) -> Counter[str]:
        """How often each operator is called, by the operator's printed name."""
        return Counter(str(node.target) for node in self.module.graph.nodes if node.op == "call_function")

    def num_collectives(self) -> Counter[str]:
        """How often each collective is called: all-gathers, reduce-scatters, all-reduces, all-to-alls."""
        counts: Counter[str] = Counter()
        for target, count in self.count_targets().items():
            for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "all_to_all_single"):
                if f"_c10d_functional.{name}" in target:
                    counts[name] += count
        return counts

    def with_module(self, module: GraphModule, note: str) -> Graph:
        """The same signature over another module, with `note` added to what has run."""
        return replace(self, module=module, notes=(*self.notes, note))

    def verify(self) -> None:
        """Raise GraphError unless this graph is well formed and its signature fits it."""
        self._lint()
        _check_count("placeholders", len(self.placeholders()), self.inputs)
        _check_count("outputs", len(self.output_values()), self.outputs)
        _check_waits(self.module)

    def _lint(self) -> None:
        try:
            self.module.graph.lint()
        except (RuntimeError, AssertionError, TypeError, ValueError) as cause:
            raise GraphError(f"the graph is not well formed: {cause}") from cause


def _check_count(what: str, found: int, specs: Sequence[object]) -> None:
    if found != len(specs):
        raise GraphError(f"the graph has {found} {what}, its signature has {len(specs)}")


def _check_waits(module: GraphModule) -> None:
    """An asynchronous collective whose result is read without a wait is a data race: refuse it."""
    wait = torch.ops._c10d_functional.wait_tensor.default
    for node in module.graph.nodes:
        if node.op != "call_function" or not _is_async_collective(node):
            continue
        for user in node.users:
            if user.op == "output" or (user.op == "call_function" and user.target is not wait and not _unpacks(user)):
                raise GraphError(f"{user.name} reads the collective {node.name} ({node.target}) before any wait_tensor")


def _unpacks(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _is_async_collective(node: Node) -> bool:
    name = str(node.target)
    return name.startswith("_c10d_functional.") and not name.startswith("_c10d_functional.wait_tensor")
