"""Compile the whole step with inductor, its collectives included."""

from __future__ import annotations

import operator
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node

from torchspan.core.errors import PassError
from torchspan.core.graph import Graph
from torchspan.core.report import Attempt
from torchspan.passes._base import Pass, PassContext, Stage
from torchspan.passes._one_call import one_call
from torchspan.passes._random import draws
from torchspan.private import inductor

_TARGET = "compiled_step"


@dataclass(frozen=True)
class FullInductorCompilation(Pass):
    """Makes one call of the graph: inductor's code for all of it, collectives and waits among its kernels.

    The graph that is left takes and gives what it did before. Inductor fuses across layers and around collectives and plans
    the memory of the whole step; its compile takes as long as the step has different kernels. In float32 numbers stay within
    1e-5; what is computed in a smaller dtype may be rounded at other places.

    Refused by name: sizes that depend on data (the tokens of an expert), operators whose kernels inductor's process lacks, and
    random numbers, of which inductor would draw others than eager; ``regional_inductor`` compiles the parts of such a step.
    Torch 2.8 is refused a step with collectives, whose compiled code there ends a rank now and then by a crash.
    """

    name: ClassVar[str] = "full_inductor_compilation"
    summary: ClassVar[str] = "compiles the whole step with inductor, collectives included, within the budget"
    stage: ClassVar[Stage] = "compile"
    tolerance: ClassVar[float] = 1e-5
    conflicts: ClassVar[tuple[str, ...]] = ("regional_inductor",)
    compiles: ClassVar[bool] = True

    def require(self, graph: Graph) -> None:
        """Raise PassError for what inductor cannot compile as a whole, or not with eager's numbers."""
        if torch.__version__ < "2.9" and graph.num_collectives():
            raise PassError(
                f"{self.name} cannot compile this step on torch {torch.__version__}: compiled with its collectives by "
                "inductor of torch 2.8 it ends now and then by a crash (docs/toolkit.md, The ten commands); expected torch 2.9 "
                "or newer, or regional_inductor{modules=…}, which compiles the parts between the collectives"
            )
        for node in graph.module.graph.nodes:
            reason = _refusal(node)
            if reason is not None:
                raise PassError(
                    f"{self.name} cannot compile {node.name} ({node.target}): {reason}; expected a step without it: "
                    "regional_inductor compiles the parts around it (annotate them, or regional_inductor{modules=…})"
                )

    def run(self, graph: Graph, context: PassContext) -> Graph:
        whole = _flat(graph)
        inputs = [node.meta["val"] for node in whole.graph.nodes if node.op == "placeholder"]
        if context.compile_region is not None:
            function = context.compile_region(whole, inputs, "step")
        else:
            function = _in_process(whole, inputs, context)
        collectives = graph.num_collectives()
        inside = ", ".join(f"{count} {kind}" for kind, count in collectives.items()) or "none"
        decision = f"1 graph of {len(graph.module.graph.nodes)} nodes; collectives inside: {inside}"
        context.report.decide("pass", self.name, decision, "inductor compiles all of the step as one")
        return graph.with_module(one_call(graph, _TARGET, function), str(self))

    def ensure(self, before: Graph, after: Graph) -> None:
        """One call is left, of all inputs."""
        calls = [node for node in after.module.graph.nodes if node.op not in ("placeholder", "output")]
        calls = [node for node in calls if node.target is not operator.getitem]
        if len(calls) != 1 or list(calls[0].args) != after.placeholders():
            raise PassError(f"{self.name} left {[node.name for node in calls]}; expected one call that takes every input")


def _refusal(node: Node) -> str | None:
    """Why inductor cannot compile a node as a part of the whole, or None."""
    if isinstance(node.meta.get("val"), (torch.SymInt, torch.SymBool, torch.SymFloat)):
        return "its value, which depends on data, becomes a size"
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if draws(node):
            return "it draws random numbers, and inductor would draw others than eager"
        if target.namespace == "torchspan":
            return "it is an operator of torchspan's, whose kernel inductor does not generate"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return "it is a higher-order operator, which is compiled as a region of its own"
    return None


def _flat(graph: Graph) -> GraphModule:
    """A copy of the graph's module without the metadata of its whole, which returns a tuple."""
    copy, nodes = FxGraph(), dict[Node, Node]()
    result = copy.graph_copy(graph.module.graph, nodes)
    copy.output(tuple(result) if isinstance(result, (tuple, list)) else (result,))
    return GraphModule(graph.module, copy, class_name="Step")


def _in_process(whole: GraphModule, inputs: Sequence[Any], context: PassContext) -> Any:

    began = time.perf_counter()
    function = inductor.compile_traced(whole, inputs)
    context.report.attempt(Attempt("whole", "step", "inductor", "compiled", time.perf_counter() - began))
    return function


PASS = FullInductorCompilation
