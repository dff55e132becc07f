"""Graph: an FX GraphModule and its signature; it verifies itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node

from torchspan.core.errors import GraphError

_COLLECTIVES = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "all_to_all_single", "all_to_all_rows")
InputKind = Literal["parameter", "buffer", "input", "tangent", "optimizer"]
OutputKind = Literal["output", "loss", "gradient", "saved", "mutation"]
PHASE = "phase"
"""Under this key of ``meta["custom"]`` a node says ``backward`` or ``optimizer``; what is of the forward has none."""
GRADIENT_OF = "gradient_of"
"""Under this key, a node's metadata name the parameter whose gradient it is, where an optimizer in the graph takes it."""

COLLECTIVES_INSIDE = "collectives_inside"
"""Under this key, the metadata of a node that calls compiled code say how often that calls each collective."""


def output_node(graph: FxGraph) -> Any:
    """The node that returns a graph's results."""
    return next(node for node in reversed(graph.nodes) if node.op == "output")


@dataclass(frozen=True)
class InputSpec:
    """What one placeholder stands for: its `kind`, and the `name` by which the program knows it.

    Of kind ``optimizer`` are the states of an optimizer in the graph, and the numbers that it takes, such as the learning rate.
    """

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

    def gradients(self) -> dict[Node, str]:
        """The nodes that are the gradients of parameters, by which: those that are given, and those that an optimizer takes."""
        pairs = zip(self.output_values(), self.outputs)
        returned = {value: spec.name for value, spec in pairs if spec.kind == "gradient" and isinstance(value, Node)}
        consumed = {node: node.meta[GRADIENT_OF] for node in self.module.graph.nodes if GRADIENT_OF in node.meta}
        return {**returned, **consumed}

    def count_targets(self) -> Counter[str]:
        """How often each operator is called, by the operator's printed name."""
        return Counter(str(node.target) for node in self.module.graph.nodes if node.op == "call_function")

    def num_collectives(self) -> Counter[str]:
        """How often each collective is called, inside of compiled code too: all-gathers, reduce-scatters, and so on."""
        counts: Counter[str] = Counter()
        for target, count in self.count_targets().items():
            for name in _COLLECTIVES:
                if target.startswith((f"_c10d_functional.{name}.", f"torchspan.{name}.")):
                    counts[name] += count
        for node in self.module.graph.nodes:
            counts.update(node.meta.get(COLLECTIVES_INSIDE, {}))
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


def _check_count(what: str, count: int, specs: Sequence[object]) -> None:
    if count != len(specs):
        raise GraphError(f"the graph has {count} {what}, its signature has {len(specs)}")


def _check_waits(module: GraphModule) -> None:
    """An asynchronous collective whose result is read without a wait is a data race: refuse it."""
    for node in module.graph.nodes:
        if is_async_collective(node):
            for user in node.users:
                if not _waits_or_asks_size(user):
                    raise GraphError(f"{user.name} reads the collective {node.name} ({node.target}) before any wait_tensor")


def is_async_collective(node: Node) -> bool:
    """Whether `node` calls a collective whose result may be read after a wait only.

    Those are torch's functional collectives, and the all-to-all of rows that expert parallelism brings.
    """
    name = str(node.target)
    if node.op != "call_function" or name.startswith("_c10d_functional.wait_tensor"):
        return False
    return name.startswith(("_c10d_functional.", "torchspan.all_to_all_rows."))


def _waits_or_asks_size(user: Node) -> bool:
    """Whether a user of a collective reads none of its numbers: a wait, a size, one of several results."""
    if user.op != "call_function":
        return False
    name = str(user.target)
    return name.startswith(("_c10d_functional.wait_tensor", "aten.sym_")) or getattr(user.target, "__name__", "") == "getitem"
