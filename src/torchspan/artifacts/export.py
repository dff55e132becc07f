"""From a capture to one entry of an artifact: its plan, its guards, and its native libraries."""

from __future__ import annotations

import copy
import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchspan.artifacts.entry import KEPT
from torchspan.artifacts.guard_export import portable_guards, portable_sizes
from torchspan.artifacts.instructions import write_program
from torchspan.artifacts.library import compile_library
from torchspan.artifacts.lowering import Lowered, lower_graph
from torchspan.artifacts.manifest import FORMAT, FORMAT_DYNAMIC, FORMAT_OBJECTS
from torchspan.artifacts.numbers_check import Parts, check_numbers
from torchspan.artifacts.paths import parse_path
from torchspan.artifacts.result_export import result_of
from torchspan.artifacts.shapes import Shapes, shapes_of
from torchspan.artifacts.size_conditions import encode_size, example_of, is_size
from torchspan.artifacts.values import name_of
from torchspan.capture.dynamo import Guards, spoken
from torchspan.core.errors import InputError, PassError, UnsupportedError
from torchspan.core.graph import Graph, InputSpec, OutputSpec, output_node
from torchspan.core.regions import cut_regions, list_regions
from torchspan.core.report import Report
from torchspan.passes._base import Pass, PassContext, editable
from torchspan.passes._metadata import complete_metadata
from torchspan.passes._pipeline import Pipeline

_WHOLE = "torchspan_whole"
_REGIONAL = "compile_with_inductor"
_NO_PASSES = Pipeline()
COMPILERS = ("inductor", "regional_inductor", "eager")

# fallback_random: random numbers are those of eager, for the same seed. dynamic_threads: a library asks how many threads there
# are when it runs; with a number compiled in, it would write past its buffers on a machine with more.
# Line tables, for debuggers, are three quarters of a library, which each load reads, checks and maps.
_OPTIONS = {"fallback_random": True, "cpp.dynamic_threads": True, "aot_inductor.enable_line_tables": False}


def compiler_name(compiler: str | Callable[..., Any] | None) -> str:
    """Which of `COMPILERS` is meant: a name, None (inductor), or the function ``regional_inductor``.

    Raises:
        InputError: an unknown name.
        UnsupportedError: another function: what it returns lives in this process only.
    """
    if compiler is None:
        return "inductor"
    if isinstance(compiler, str):
        if compiler not in COMPILERS:
            raise InputError(f"no compiler {compiler!r} for an artifact; expected one of {', '.join(COMPILERS)}")
        return compiler
    if getattr(compiler, "__name__", "") == "regional_inductor":
        return "regional_inductor"
    raise UnsupportedError(
        f"an artifact cannot hold what {compiler!r} returns; expected one of {', '.join(COMPILERS)} "
        "(Precompile.aot_autograd takes any)"
    )


def export_entry(
    prefix: str,
    module: GraphModule,
    guards: Guards,
    compiler: str,
    report: Report,
    pipeline: Pipeline = _NO_PASSES,
    verify: bool = True,
) -> Parts:
    """Lower a capture to operators, run the passes, compile what `compiler` compiles, and write everything down.

    Raises:
        UnsupportedError: the program needs what an artifact cannot hold; names it.
        CompileError: what was compiled gives other numbers than the operators, if that is to be verified.
    """
    frame = guards.frame
    _refuse_inputs(module, frame.inputs)
    shapes = shapes_of(frame.context)
    sources = [source for source, value in zip(frame.sources, frame.inputs) if not is_size(value)]
    paths = [parse_path(source, frame.scope) for source in sources]
    guarded = portable_guards(guards, paths)
    result, stores = result_of(guards)
    with torch.set_grad_enabled(frame.grad_mode):
        lowered = lower_graph(module, frame.inputs, frame.context, decompose=compiler == "inductor")
    plan = {**_plan(lowered), "result": result, **({"stores": stores} if stores else {})}
    graphs: dict[str, GraphModule | None] = {"forward": lowered.forward, "backward": lowered.backward}
    parts = Parts({"plan": f"{prefix}/plan.json", "guards": f"{prefix}/guards.json", "libraries": [], "constants": None})
    constants: dict[str, torch.Tensor] = {}
    for name, graph in graphs.items():
        graphs[name] = changed = graph if graph is None else _passed(graph, name, pipeline, report)
        try:
            plan[name] = None if changed is None else _write_graph(prefix, name, changed, compiler, shapes, parts, constants)
        except UnsupportedError as cause:
            line = _line_of_unknown_size(module)
            if line is None:
                raise
            raise UnsupportedError(
                f"{cause}; it is made at {line}: keep a fixed size there, with torch.where or a mask"
            ) from cause
    if constants:
        parts.program["constants"] = f"{prefix}/constants.safetensors"
        parts.payloads[parts.program["constants"]] = _write_tensors(constants)
    if verify and parts.program["libraries"]:
        symbols = {name: example_of(size) for name, size in shapes.symbols.items()}
        check_numbers(graphs, plan, parts, frame.inputs, symbols, guards.program.name)
    parts.format = FORMAT_OBJECTS if stores or _has_objects(result) else FORMAT
    guarded["sizes"] = portable_sizes(guards)
    if guarded["sizes"]:
        parts.format = max(parts.format, FORMAT_DYNAMIC)
        where = ", ".join(spoken(source) for source in shapes.sources.values())
        report.decide(
            "precompile",
            guards.program.name,
            "dynamic sizes",
            f"{where}; {len(guarded['sizes']['conditions'])} conditions on them",
        )
    parts.payloads[parts.program["plan"]] = json.dumps(plan).encode()
    parts.payloads[parts.program["guards"]] = json.dumps(guarded).encode()
    num_libraries = len(parts.program["libraries"])
    report.decide(
        "precompile", guards.program.name, compiler, f"{num_libraries} native libraries, {len(guarded['always'])} guards"
    )
    return parts


def _line_of_unknown_size(module: GraphModule) -> str | None:
    """``file:line`` where the program makes a tensor whose size depends on data."""
    for node in module.graph.nodes:
        value = node.meta.get("example_value")
        sizes: tuple[Any, ...] = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
        if any(is_size(size) and str(size.node.expr).startswith("u") for size in sizes):
            lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
            return ":".join(lines[-1]) if lines else None
    return None


def _has_objects(structure: Any) -> bool:
    if isinstance(structure, list):
        return any(map(_has_objects, structure))
    return isinstance(structure, dict) and ("object" in structure or any(map(_has_objects, structure.values())))


def _refuse_inputs(module: GraphModule, inputs: tuple[Any, ...]) -> None:
    for node, value in zip((node for node in module.graph.nodes if node.op == "placeholder"), inputs):
        if is_size(value):
            continue
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise UnsupportedError(
                f"an artifact's graphs take plain tensors; {node.name} is a {type(value).__name__}: take it apart"
            )
        if value.device.type != "cpu" or value.layout is not torch.strided:
            raise UnsupportedError(
                f"artifacts are for dense tensors on a CPU so far; {node.name} is {value.layout} on {value.device}"
            )


# the plan: what happens around the graphs


def _plan(lowered: Lowered) -> dict[str, Any]:
    placeholders = _tensor_inputs(lowered.forward)
    values = _output_nodes(lowered.forward)
    num_mutated, num_results = len(lowered.mutated), len(lowered.outputs) + lowered.num_bases
    results = values[num_mutated : num_mutated + num_results]
    saved = values[num_mutated + num_results :]
    outputs = []
    for index, output in enumerate(lowered.outputs):
        spec: dict[str, Any] = {"kind": output.kind, "grad": output.requires_grad}
        if output.kind not in KEPT:
            base = _base_of(output.kind, output.base, placeholders, results, len(lowered.outputs))
            spec |= {"base": output.base, **_placed(results[index], base)}
        outputs.append(spec)
    plan: dict[str, Any] = {"mutated": list(lowered.mutated), "outputs": outputs, "num_bases": lowered.num_bases}
    return {**plan, **_backward_plan(lowered, [node.name for node in saved])}


def _tensor_inputs(module: GraphModule) -> list[Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder" and not is_size(node.meta.get("val"))]


def _numbers(values: Any) -> list[Any]:
    return [encode_size(value) for value in values]


def _output_nodes(module: GraphModule) -> list[Any]:
    return list(output_node(module.graph).args[0])


def _base_of(kind: str, base: int | None, placeholders: list[Node], results: list[Any], num_outputs: int) -> Node:
    assert base is not None, f"an output that is {kind} has no base"
    if kind in ("is_input", "alias_of_input"):
        return placeholders[base]
    if kind == "alias_of_intermediate_base_is_user_output":
        return results[base]
    if kind in ("alias_of_intermediate", "alias_of_intermediate_save_as_output"):
        return results[num_outputs + base]
    raise UnsupportedError(f"an artifact cannot hold an output that is {kind}")


def _placed(node: Any, base: Node) -> dict[str, Any]:
    """Where in its base a view lies."""
    value, whole = node.meta["val"], base.meta["val"]
    if value.dtype != whole.dtype or value.is_conj() or value.is_neg():
        raise UnsupportedError(
            f"an artifact cannot hold an output that is a view of another type "
            f"({value.dtype} of {whole.dtype}); return a copy of it"
        )
    return {
        "shape": _numbers(value.shape),
        "stride": _numbers(value.stride()),
        "offset": _numbers([value.storage_offset() - whole.storage_offset()])[0],
    }


def _backward_plan(lowered: Lowered, saved: list[str]) -> dict[str, Any]:
    """Which saved values and which gradients the backward takes, in its order."""
    if lowered.backward is None:
        return {"tangents": [], "backward_inputs": []}
    differentiable = [i for i, output in enumerate(lowered.outputs) if output.kind in KEPT and output.requires_grad]
    differentiable += range(len(lowered.outputs), len(lowered.outputs) + lowered.num_bases)
    placeholders = _tensor_inputs(lowered.backward)
    tangents = [node for node in placeholders if node.name not in saved]
    num_gradients = len(_output_nodes(lowered.backward))
    num_inputs = len(_tensor_inputs(lowered.forward))
    if len(tangents) != len(differentiable) or num_gradients != num_inputs:
        raise UnsupportedError(
            f"an artifact cannot hold this backward: it takes {len(tangents)} gradients for {len(differentiable)} outputs "
            "and gives "
            f"{num_gradients} for {num_inputs} inputs"
        )
    order = [
        ["saved", saved.index(node.name)] if node.name in saved else ["tangent", tangents.index(node)] for node in placeholders
    ]
    return {
        "tangents": [_tangent(node, result) for node, result in zip(tangents, differentiable)],
        "backward_inputs": order,
    }


def _tangent(node: Node, result: int) -> dict[str, Any]:
    value = node.meta["val"]
    dtype = str(value.dtype).removeprefix("torch.")
    return {"result": result, "shape": _numbers(value.shape), "stride": _numbers(value.stride()), "dtype": dtype}


# passes


@dataclass(frozen=True)
class _FunctionPass(Pass):
    """A user's function of a GraphModule as a pass."""

    function: Callable[[GraphModule], GraphModule | None]

    @property
    def name(self) -> str:  # type: ignore[override]
        """Where the function is defined."""
        return name_of(self.function)

    def __str__(self) -> str:
        return self.name

    def run(self, graph: Graph, context: PassContext) -> Graph:
        """What the function returns, or the copy that it changed."""
        module = editable(graph)
        result = self.function(module)
        if not (result is None or isinstance(result, GraphModule)):
            raise PassError(f"the pass {self.name} returned a {type(result).__name__}; expected a GraphModule, or None")
        changed = result or module
        complete_metadata(changed)
        changed.recompile()
        return graph.with_module(changed, self.name)


def pipeline_of(passes: str | Sequence[Any]) -> Pipeline:
    """The pipeline of `passes`: text, or passes and functions of a GraphModule.

    Raises:
        InputError: something else, or a pass that compiles: what it gives lives in this process only.
    """
    if isinstance(passes, str):
        pipeline = Pipeline.parse(passes)
    else:
        items: Sequence[Any] = passes if isinstance(passes, (list, tuple)) else (passes,)
        wrong = [item for item in items if not callable(item) and not isinstance(item, Pass)]
        if wrong:
            raise InputError(f"a pass is a Pass or a function of a GraphModule, not a {type(wrong[0]).__name__}")
        pipeline = Pipeline(tuple(item if isinstance(item, Pass) else _FunctionPass(item) for item in items))
    for pass_ in pipeline.passes:
        if pass_.compiles:
            raise InputError(
                f"the pass {pass_.name} compiles in this process; for an artifact, say compiler='regional_inductor'"
            )
    return pipeline


def _passed(module: GraphModule, name: str, pipeline: Pipeline, report: Report) -> GraphModule:
    """An operator graph after every pass."""
    if not pipeline.passes:
        return module
    inputs = tuple(InputSpec("input", node.name) for node in module.graph.nodes if node.op == "placeholder")
    outputs = tuple(OutputSpec("output", f"{name}_{index}") for index in range(len(_output_nodes(module))))
    before = Graph(module, inputs, outputs)
    after = pipeline.run(before, PassContext(report))
    counts = f"{len(before.module.graph.nodes)} nodes before, {len(after.module.graph.nodes)} after"
    report.decide("pass", name, str(pipeline), counts)
    return after.module


# the graphs


def _write_graph(
    prefix: str,
    name: str,
    graph: GraphModule,
    compiler: str,
    shapes: Shapes,
    parts: Parts,
    constants: dict[str, torch.Tensor],
) -> dict[str, Any]:
    """One graph as JSON, its compiled parts as libraries among the payloads."""
    key = {"inductor": _WHOLE, "regional_inductor": _REGIONAL, "eager": None}[compiler]
    graph = _with_sizes_given(graph)
    cut = graph if key is None else cut_regions(_marked(graph) if key == _WHOLE else graph, key)
    libraries: dict[str, tuple[str, list[str]]] = {}
    for region in list_regions(cut):
        library = f"{prefix}/{name}.{region.target}.so"
        options = {**_OPTIONS, **_annotated_options(region.annotation)}
        compiled, described, symbols = compile_library(region.module, options, shapes)
        libraries[region.target] = library, symbols
        parts.payloads[library] = compiled
        if described is not None:
            parts.payloads[library.removesuffix(".so") + ".json"] = described
    parts.program["libraries"] += [library for library, _ in libraries.values()]
    written, held = write_program(cut, libraries)
    constants.update({f"{name}/{attribute}": tensor.detach().contiguous() for attribute, tensor in held.items()})
    return written


def _with_sizes_given(graph: GraphModule) -> GraphModule:
    """A copy in which numbers that are computed of dynamic sizes are inputs: no region has to end where one is computed."""
    computed = [node for node in graph.graph.nodes if node.op == "call_function" and is_size(node.meta.get("val"))]
    if not computed:
        return graph
    copied = torch.fx.Graph()
    new: dict[Node, Node] = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            new[node] = copied.node_copy(node)
    for node in computed:
        new[node] = copied.placeholder(node.name)
        new[node].meta = dict(node.meta)
    for node in graph.graph.nodes:
        if node not in new:
            new[node] = copied.node_copy(node, new.__getitem__)
    return GraphModule(graph, copied)


def _marked(graph: GraphModule) -> GraphModule:
    """A copy whose every operator is marked as part of one region."""
    copied = GraphModule(graph, copy.deepcopy(graph.graph))
    for node in copied.graph.nodes:
        if node.op.startswith("call_") and not is_size(node.meta.get("val")) and not _is_operator_only(node):
            node.meta["custom"] = {_WHOLE: "whole"}
    return copied


def _is_operator_only(node: Node) -> bool:
    """Whether an operator has to be called by itself: inside a library, it keeps no workspace for its backward."""
    return str(node.target).startswith("aten.mkldnn_rnn_layer") or (
        node.target is operator.getitem and isinstance(node.args[0], Node) and _is_operator_only(node.args[0])
    )


def _annotated_options(annotation: Any) -> Mapping[str, Any]:
    return annotation.get("inductor_configs", {}) if isinstance(annotation, dict) else {}


def _write_tensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.clone() for name, tensor in tensors.items()})
