"""What a pass is: options as fields, a precondition, Graph → Graph, and a claim about the result that is checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node

from torchspan.core.errors import PassError
from torchspan.core.graph import Graph, output_node
from torchspan.core.registry import Registry
from torchspan.core.report import Report

REGISTRY = Registry("torchspan.passes", "pass")

Stage = Literal["operators", "memory", "communication", "compile"]
STAGES: tuple[Stage, ...] = ("operators", "memory", "communication", "compile")
"""What a pass changes: which operators compute; what is kept for the backward and where; when and how ranks talk; what runs it.

Passes of a pipeline stand in this order: what is later works on what is earlier.
"""

CompileRegion = Callable[[GraphModule, Sequence[Any], str], Callable[..., Any]]
"""Compiles one region: its graph, example inputs (fake tensors), and name, to a callable that returns the region's outputs."""


@dataclass(frozen=True)
class PassContext:
    """What a pass may use.

    The Report that it writes to; what compiles a region (inductor in this process, if None); and whether what this machine
    cannot do is an error (`strict`), not a Decision that leaves the graph as it is.
    """

    report: Report = field(default_factory=Report)
    compile_region: CompileRegion | None = None
    strict: bool = False


@dataclass(frozen=True)
class Pass:
    """A change to a Graph; the fields of a subclass are its options.

    A pass is pure: it leaves the graph that it is given as it is. Its file, named as the pass is, has it under ``PASS``.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    stage: ClassVar[Stage | None] = None
    """What it changes; None may stand anywhere."""
    tolerance: ClassVar[float] = 0.0
    """How far a value may be from what the graph gave before, over the largest value of its tensor; 0 claims the same bits."""
    conflicts: ClassVar[tuple[str, ...]] = ()
    """Names of passes that may not be in the same pipeline."""
    after: ClassVar[tuple[str, ...]] = ()
    """Names of passes of the same stage that stand before this one, where they are there at all."""
    compiles: ClassVar[bool] = False
    """Whether it calls `PassContext.compile_region`: what it gives may not be called before all passes have run."""
    reads_annotations: ClassVar[bool] = False
    """Whether it works on the regions that a model annotates, which a training job then lets the model do."""

    def require(self, graph: Graph) -> None:
        """Raise PassError if this pass cannot work on `graph`."""

    def run(self, graph: Graph, context: PassContext) -> Graph:
        """The changed graph."""
        raise NotImplementedError

    def ensure(self, before: Graph, after: Graph) -> None:
        """Raise PassError unless what this pass claims is true of its result."""

    @classmethod
    def claim(cls) -> str:
        """What it claims of the numbers, as text: ``bitwise``, or within how much of the largest value."""
        return f"within {cls.tolerance:g}" if cls.tolerance else "bitwise"

    def __str__(self) -> str:
        options = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return self.name + (f"{{{','.join(options)}}}" if options else "")


def editable(graph: Graph) -> GraphModule:
    """A copy of the graph's module that a pass may change; tensors and submodules are shared."""
    copy, nodes = FxGraph(), dict[Node, Node]()
    result = copy.graph_copy(graph.module.graph, nodes)
    output = copy.output(result)
    output.meta = dict(output_node(graph.module.graph).meta)
    copy.set_codegen(graph.module.graph._codegen)
    module = GraphModule(graph.module, copy, class_name=type(graph.module).__name__)
    module.meta = dict(graph.module.meta)
    return module


def refuse_writes(name: str, graph: Graph) -> None:
    """Raise PassError if the graph writes in place: nodes of such a graph cannot change places freely."""
    for node in graph.module.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise PassError(f"{name} moves nodes, but {node.name} ({node.target}) writes in place; expected a functional graph")
