"""Compile the annotated regions of a graph with inductor, and leave the rest as it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from torchspan.core.errors import PassError
from torchspan.core.graph import Graph
from torchspan.core.regions import Region, cut_regions, list_regions, replace_region
from torchspan.core.report import Attempt, Report
from torchspan.passes._base import CompileRegion, Pass, PassContext, Stage, editable
from torchspan.passes._blocks import block_of, part_of, patterns_of
from torchspan.passes._flex import device_of, is_flex, make_dense
from torchspan.private import inductor

_KEY = "compile_with_inductor"


@dataclass(frozen=True)
class RegionalInductor(Pass):
    """Cuts the graph into regions and compiles each; equal regions are compiled once.

    A region is what the program annotated (``torch.fx.traceback.annotate({"compile_with_inductor": name})``), or, with
    `modules`, what the submodules did whose paths answer to one of its patterns (``*.feed_forward``, several by ``|``).
    Collectives and waits stay outside, so that a region can be compiled in a process that has no process groups; so do views of
    what is outside. FlexAttention on a CPU, of which inductor has no backward there, is made dense operators in its region.
    """

    name: ClassVar[str] = "regional_inductor"
    summary: ClassVar[str] = "compiles annotated regions with inductor, within the budget; the rest stays as it is"
    stage: ClassVar[Stage] = "compile"
    reads_annotations: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-5
    compiles: ClassVar[bool] = True

    modules: str = ""

    def run(self, graph: Graph, context: PassContext) -> Graph:
        module = editable(graph)
        _annotate(module, self.modules)
        self._make_dense(module, context.report)
        cut = cut_regions(module, _KEY)
        regions = list_regions(cut)
        compiled = self._compile(regions, context)
        for region, function in zip(regions, compiled):
            # a bound call: a module that is made an attribute of another would become its submodule
            replace_region(cut, region, function.__call__ if isinstance(function, torch.nn.Module) else function)
        return graph.with_module(cut, str(self))

    def _make_dense(self, module: GraphModule, report: Report) -> None:
        """Write FlexAttention out where a region holds it and inductor cannot compile it."""
        inside = [node for node in module.graph.nodes if is_flex(node) and _KEY in (node.meta.get("custom") or {})]
        on_cpu = [node for node in inside if device_of(node).type == "cpu"]
        for node in on_cpu:
            make_dense(module, node)
        if on_cpu:
            reason = "inductor has no backward of it for a CPU; scores take memory by the square of the sequence, as in eager"
            report.decide("pass", f"{self.name}: FlexAttention", f"{len(on_cpu)} → dense operators", reason)

    def _compile(self, regions: list[Region], context: PassContext) -> list[Callable[..., Any]]:
        compile_region = context.compile_region or _in_process(context.report)
        done: dict[Hashable, Callable[..., Any]] = {}
        for region in regions:
            key = structure(region.module)
            if key not in done:
                inputs = region.example_inputs()
                done[key] = compile_region(region.module, inputs, f"{region.name}_{len(done)}")
        self._record(len(regions), len(done), context.report)
        return [done[structure(region.module)] for region in regions]

    def _record(self, num_regions: int, num_compiled: int, report: Report) -> None:
        if num_regions:
            report.decide(
                "pass", self.name, f"{num_regions} regions, {num_compiled} compiled", "equal regions share one compile"
            )
        else:
            reason = "no node is annotated with compile_with_inductor; annotate, or name modules: regional_inductor{modules=…}"
            report.decide("pass", self.name, "nothing changed", reason)

    def ensure(self, before: Graph, after: Graph) -> None:
        """Every collective is where it was: outside of what was compiled."""
        if before.num_collectives() != after.num_collectives():
            raise PassError(
                f"{self.name} changed the collectives: {dict(before.num_collectives())} before, "
                f"{dict(after.num_collectives())} after"
            )


def _annotate(module: GraphModule, patterns: str) -> None:
    """Annotate the nodes of the modules asked for, and take annotations off collectives and views of what is outside."""
    globs = patterns_of(patterns)
    for node in module.graph.nodes:
        custom = dict(node.meta.get("custom") or {})
        path = custom.get("module", "")
        part = part_of(path, globs)
        if part is not None:
            custom[_KEY] = part
        elif isinstance(custom.get(_KEY), str) and (block := block_of(path)) is not None:
            # a region stays within its block: the blocks' regions are then equal, and one compile serves them all
            custom[_KEY] = f"{block}.{custom[_KEY]}"
        if "c10d" in str(node.target) or _views_what_is_outside(node):
            custom.pop(_KEY, None)
        if custom:
            node.meta["custom"] = custom


def _views_what_is_outside(node: Node) -> bool:
    """Whether the node is a view of a value that is in no region.

    Such a view costs nothing where it is; returned from a region, it would be an output that aliases an input, which torch 2.8
    refuses to cache.
    """
    schema = getattr(node.target, "_schema", None)
    if schema is None or len(schema.returns) != 1 or schema.returns[0].alias_info is None or schema.is_mutable:
        return False
    viewed = node.args[0]
    return isinstance(viewed, Node) and _KEY not in (viewed.meta.get("custom") or {})


def _in_process(report: Report) -> CompileRegion:
    """Inductor in this process, each compile an Attempt."""

    def compile_region(module: GraphModule, inputs: Sequence[Any], name: str) -> Callable[..., Any]:
        began = time.perf_counter()
        function = inductor.compile_traced(module, inputs)
        report.attempt(Attempt("regional", name, "inductor", "compiled", time.perf_counter() - began))
        return function

    return compile_region


def structure(module: GraphModule) -> Hashable:
    """A key that is equal for two graphs that compute the same from inputs of the same shapes: one compile serves both."""
    number: dict[Node, int] = {}
    lines: list[Hashable] = []
    for node in module.graph.nodes:
        number[node] = len(number)
        arguments = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{number[n]}")
        target = node.target if node.op == "call_function" else None
        held = _identity(_held(module, node)) if node.op in ("get_attr", "call_module") else None
        lines.append((node.op, target, repr(arguments), held, _shape(node) if node.op == "placeholder" else None))
    return tuple(lines)


def _identity(held: Any) -> Hashable:
    """The key of a graph that an operator calls, as FlexAttention does, is what it computes; of all else, the object itself."""
    return structure(held) if isinstance(held, GraphModule) else id(held)


def _held(module: GraphModule, node: Node) -> Any:
    return attrgetter(str(node.target))(module)


def _shape(node: Node) -> Hashable:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return (tuple(value.shape), value.stride(), value.dtype, value.device)


PASS = RegionalInductor
