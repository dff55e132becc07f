"""The private names of torch that artifacts need, imported when they are called for; a new torch breaks here."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchspan.artifacts.size_conditions import Expression, encode_size, is_size
from torchspan.capture._torch import source_name
from torchspan.capture.dynamo import spoken
from torchspan.core.errors import UnsupportedError
from torchspan.core.graph import output_node
from torchspan.core.memory import blank_storage

# compiling in this process, by AOTAutograd


def compile_graph(module: GraphModule, inputs: tuple[Any, ...], context: Any, compiler: Callable[..., Any] | None) -> Any:
    """A callable of the graph's inputs: forward and backward by AOTAutograd, each compiled by `compiler` (None: inductor)."""
    from torch._functorch import config

    # a backward that were compiled at its first call could add conditions on sizes when it is too late
    eager = {"force_non_lazy_backward_lowering": True} if _has_setting(config, "force_non_lazy_backward_lowering") else {}
    with _compiling(context), config.patch(eager):
        return _compiled(module, inputs, compiler)


def _compiled(module: GraphModule, inputs: tuple[Any, ...], compiler: Callable[..., Any] | None) -> Any:
    if compiler is None:
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(copy_of(module), list(inputs))
    from torch._dynamo.backends.common import aot_autograd

    boxed = _boxing(compiler)
    return aot_autograd(fw_compiler=boxed, bw_compiler=boxed)(copy_of(module), list(inputs))


def _boxing(compiler: Callable[..., Any]) -> Callable[..., Any]:
    """The compiler, whose functions take their inputs in one list and clear it: AOTAutograd calls those without a warning."""

    def compile_boxed(graph: GraphModule, example_inputs: Any) -> Any:
        compiled = compiler(graph, example_inputs)
        if getattr(compiled, "_boxed_call", False):
            return compiled

        def boxed(inputs: list[Any]) -> Any:
            given = tuple(inputs)
            inputs.clear()
            return compiled(*given)

        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed

    return compile_boxed


def copy_of(module: GraphModule) -> GraphModule:
    """A copy whose graph a compiler may change; what the nodes refer to is shared."""
    copied = GraphModule(module, copy.deepcopy(module.graph))
    copied.meta.update(module.meta)
    return copied


@contextmanager
def _compiling(context: Any) -> Iterator[None]:
    """What a compiler expects around it: the tracing context of the capture, and node metadata carried through traces."""
    from torch._guards import tracing
    from torch.fx.traceback import preserve_node_meta

    with tracing(context), preserve_node_meta(), warnings.catch_warnings():
        # 2.13 deep-copies a pytree spec through a check that it deprecated itself
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated", category=FutureWarning)
        yield


# exporting: the graphs of AOTAutograd, and what its runtime would have to do around them


@dataclass(frozen=True)
class Output:
    """One output of the program: how AOTAutograd sees it, of which base, and whether gradients flow to it."""

    kind: str
    base: int | None
    requires_grad: bool


@dataclass(frozen=True)
class Lowered:
    """Operator graphs of a program: `forward`, and `backward` when it trains, with what has to happen around them.

    The forward gives new values for the inputs at `mutated`, then `outputs`, then `num_bases` tensors of which outputs are
    views, then what the backward needs.
    """

    forward: GraphModule
    backward: GraphModule | None
    mutated: tuple[int, ...]
    outputs: tuple[Output, ...]
    num_bases: int


def lower_graph(module: GraphModule, inputs: tuple[Any, ...], context: Any, decompose: bool) -> Lowered:
    """The operator graphs that AOTAutograd makes of a graph, as inductor would get them if `decompose`.

    Raises:
        UnsupportedError: the program needs something at run time that is not carried; names it.
    """
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor import config
    from torch._inductor.decomposition import select_decomp_table

    seen: dict[str, Any] = {}

    def partition(joint: GraphModule, joint_inputs: Any, **settings: Any) -> tuple[GraphModule, GraphModule]:
        _draw_once(joint)
        seen["forward"], seen["backward"] = min_cut_rematerialization_partition(joint, joint_inputs, **settings)
        return seen["forward"], seen["backward"]

    def keep(gm: GraphModule, example_inputs: Any) -> Any:
        from torch._guards import TracingContext

        seen.setdefault("forward", gm)
        seen.setdefault("metadata", TracingContext.get().fw_metadata)
        return gm.forward

    module = copy_of(module)
    _take_contiguous(module)
    with _compiling(context), config.patch(fallback_random=True), _recurrent_as_eager():
        table: Any = {**(select_decomp_table() if decompose else {}), torch.ops.aten.bernoulli.p: _bernoulli_in_memory_order}
        aot_module_simplified(
            module,
            list(inputs),
            fw_compiler=keep,
            bw_compiler=keep,
            inference_compiler=keep,
            partition_fn=partition,
            decompositions=table,
        )
    metadata, forward, backward = seen["metadata"], seen["forward"], seen.get("backward")
    _refuse_uncarried(metadata, forward, len(inputs))
    places = {number: place for place, number in enumerate(i for i, value in enumerate(inputs) if not is_size(value))}
    outputs = tuple(
        Output(info.output_type.name, _place(places, info), bool(info.requires_grad)) for info in metadata.output_info
    )
    mutated = tuple(places[index] for index in metadata.mutated_inp_runtime_indices)
    num_given = len(mutated) + len(outputs) + metadata.num_intermediate_bases
    _keep_outputs(forward, lambda index, value: index < num_given or not is_size(_value(value)))
    if backward is not None:
        _keep_outputs(backward, lambda index, _: index in places)
    return Lowered(forward, backward, mutated, outputs, metadata.num_intermediate_bases)


def _draw_once(joint: GraphModule) -> None:
    """Have what is random saved, and not drawn again in the backward, where ``checkpoint`` says to compute again."""
    from torch.utils.checkpoint import CheckpointPolicy

    for node in joint.graph.nodes:
        if "recompute" in node.meta and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            is_one = isinstance(node.meta["val"], torch.Tensor)
            del node.meta["recompute"]
            for value in [node] if is_one else node.users:
                value.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _bernoulli_in_memory_order(value: torch.Tensor, p: float = 0.5, *, generator: Any = None) -> Any:
    """Random numbers in the order in which the memory of `value` lies, as ``bernoulli_`` draws them; else made functional, it
    draws them in the order of the indices."""
    strides = value.stride()
    order = sorted(range(value.dim()), key=lambda dim: -strides[dim])
    if order == list(range(value.dim())) or any(map(is_size, strides)):
        return NotImplemented
    drawn = torch.ops.aten.bernoulli.p(value.permute(order).contiguous(), p, generator=generator)
    return drawn.permute([order.index(dim) for dim in range(value.dim())])


def _take_contiguous(module: GraphModule) -> None:
    """Have ``torch.bernoulli(value, p)``, which is no ``bernoulli_`` and draws in the order of indices, do so."""
    for node in list(module.graph.nodes):
        if node.target is torch.bernoulli and len(node.args) + ("p" in node.kwargs) > 1:
            with module.graph.inserting_before(node):
                node.update_arg(0, module.graph.call_method("contiguous", (node.args[0],)))


_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@contextmanager
def _recurrent_as_eager() -> Iterator[None]:
    """Recurrent operators are taken apart as eager does: torch's table (up to 2.15) leaves out dropout between layers."""
    keys = (torch._C.DispatchKey.CompositeImplicitAutograd, torch._C.DispatchKey.Autograd)
    packets = [getattr(torch.ops.aten, name) for name in _RECURRENT]
    operators = [getattr(packet, name) for packet in packets for name in packet.overloads()]
    kept = [
        (operator, key, operator.py_kernels.pop(key)) for operator in operators for key in keys if key in operator.py_kernels
    ]
    for operator in operators:
        operator._dispatch_cache.clear()
    try:
        yield
    finally:
        for operator, key, kernel in kept:
            operator.py_kernels[key] = kernel
            operator._dispatch_cache.clear()


def _place(places: Mapping[int, int], info: Any) -> int | None:
    """The base of an output; of those that are inputs, where it stands among the tensors."""
    of_input = info.output_type.name in ("is_input", "alias_of_input")
    return places[info.base_idx] if of_input else info.base_idx


def _value(node: Any) -> Any:
    return node.meta["val"] if isinstance(node, torch.fx.Node) else node


def _keep_outputs(module: GraphModule, is_kept: Callable[[int, Any], bool]) -> None:
    output = output_node(module.graph)
    output.args = (tuple(value for index, value in enumerate(output.args[0]) if is_kept(index, value)),)
    module.recompile()


@dataclass(frozen=True)
class Shapes:
    """What a capture knows of dynamic sizes: `symbols` and where each is found; tensors whose shape has any, by source.

    Those of `firm` may not be fixed: somebody said that they are dynamic, and did not only wish it.
    """

    symbols: Mapping[str, torch.SymInt]
    firm: frozenset[str]
    sources: Mapping[str, str]
    tensors: Mapping[str, Any]
    context: Any

    def conditions(self) -> list[str]:
        """All that was assumed of shapes, also by compilers that ran since.

        Raises:
            UnsupportedError: a dimension that was marked as dynamic was fixed.
        """
        env, tracked = self.context.fake_mode.shape_env, self.context.fake_mode.shape_env.tracked_fakes
        for name, symbol in self.symbols.items():
            if name in self.firm and env.replace(symbol.node._expr).is_number:
                raise UnsupportedError(
                    f"{spoken(self.sources[name])} was marked as dynamic, and the program or its compiler needs it to be "
                    f"{env.replace(symbol.node._expr)}; leave that dimension unmarked"
                )
        return list(env.produce_guards([entry.fake for entry in tracked], [entry.source for entry in tracked]))


def shapes_of(context: Any) -> Shapes:
    """The dynamic sizes of a capture, from its tracing context."""
    env = getattr(context.fake_mode, "shape_env", None)
    tracked = getattr(env, "tracked_fakes", None) or []
    symbols: dict[str, torch.SymInt] = {}
    tensors: dict[str, Any] = {}
    firm: set[str] = set()
    for entry in tracked:
        found = (
            [size for size in (*entry.fake.shape, *entry.fake.stride()) if is_size(size)]
            if isinstance(entry.fake, torch.Tensor)
            else []
        )
        if found:
            tensors[source_name(entry.source)] = entry.fake
            said = entry.symbolic_context.constraint_sizes
            firm |= {
                str(size.node._expr)
                for size, each in zip(entry.fake.shape, said)
                if each and not each.warn_only and is_size(size)
            }
        for size in [*found, *([entry.fake] if is_size(entry.fake) else [])]:
            if size.node._expr.is_symbol:
                symbols.setdefault(str(size.node._expr), size)
    known = {str(symbol): source_name(found[0]) for symbol, found in getattr(env, "var_to_sources", {}).items() if found}
    sources = {name: known[name] for name in symbols if re.search(r"\.(size|stride)\(\)\[", known[name])}
    return Shapes({name: symbols[name] for name in sources}, frozenset(firm), sources, tensors, context)


def _refuse_uncarried(metadata: Any, forward: GraphModule, num_inputs: int) -> None:
    """Raise for whatever AOTAutograd's own runtime does around the graphs and an artifact does not."""
    num_placeholders = sum(node.op == "placeholder" for node in forward.graph.nodes)
    changed = [metadata.input_info[index] for index in metadata.mutated_inp_runtime_indices]
    reasons = {
        f"its operators {_ordered(forward)} do more than compute, such as raise an error": bool(metadata.tokens),
        "its random numbers are made functional (config.functionalize_rng_ops)": metadata.is_rng_op_functionalized,
        "two of its inputs share memory and one is changed in place": num_placeholders != num_inputs,
        "it changes the shape or strides of an input in place": any(info.mutates_metadata for info in changed),
        "it changes an input that gradients flow to in place": any(
            info.requires_grad and not info.mutations_under_no_grad_or_inference_mode for info in changed
        ),
        "it takes or gives a tensor subclass": any(
            hasattr(meta, "attrs") for meta in (*metadata.subclass_inp_meta, *metadata.subclass_fw_graph_out_meta)
        ),
    }
    for reason, found in reasons.items():
        if found:
            raise UnsupportedError(f"an artifact cannot hold this program: {reason}; compile it with torch.compile")


def _ordered(forward: GraphModule) -> str:
    """The operators that are kept in their order for what else they do, by name."""
    found = [node.args[1] for node in forward.graph.nodes if str(node.target) == "with_effects" and len(node.args) > 1]
    return ", ".join(sorted(set(map(str, found))))


# compiling a graph into a native library


def compile_library(module: GraphModule, options: Mapping[str, Any], shapes: Shapes) -> tuple[bytes, bytes | None, list[str]]:
    """A shared library that computes a graph, the description of operators that it calls by name, if any, and symbols.

    Everything that the graph takes is an input; nothing of the values of weights goes into it. It takes for each of the symbols
    that it needs an empty tensor of that size, then its tensors in order.
    """
    import torch._inductor
    from torch._inductor import config

    module, needed = _with_sizes_from_tensors(module, shapes)
    values = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    inputs = tuple(values if needed else map(_example, values))
    known = {name: value for name, value in options.items() if _has_setting(config, name)}
    with TemporaryDirectory(prefix="torchspan-") as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated", category=FutureWarning)
        wanted = str(Path(folder) / "library.so")
        made = torch._inductor.aot_compile(copy_of(module), inputs, options={**known, "aot_inductor.output_path": wanted})
        library = Path(str(made))
        described = next(Path(folder).glob("*.wrapper.json"), None)  # beside the code, and named as that is
        return library.read_bytes(), None if described is None else described.read_bytes(), needed


def _with_sizes_from_tensors(module: GraphModule, shapes: Shapes) -> tuple[GraphModule, list[str]]:
    """The same graph without numbers among its inputs: it has them from the sizes of empty tensors, one for each symbol."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    needed = sorted(set().union(*(_symbols_in(node.meta["val"]) for node in placeholders)))
    if not needed:
        return module, []
    graph = torch.fx.Graph()
    taken = [graph.placeholder(f"size_{name}") for name in needed]  # first: sizes of later inputs may be made of them
    new = {node: graph.node_copy(node) for node in placeholders if not is_size(node.meta["val"])}
    numbers: dict[str, Node] = {}
    for name, place in zip(needed, taken):
        with shapes.context.fake_mode:
            place.meta["val"] = torch.empty(shapes.symbols[name], 0)
        numbers[name] = graph.call_function(torch.ops.aten.sym_size.int, (place, 0))
    for node in placeholders:
        if is_size(node.meta["val"]):
            new[node] = Expression.of(encode_size(node.meta["val"])["size"]).node(graph, numbers)
    for node in module.graph.nodes:
        if node.op != "placeholder":
            new[node] = graph.node_copy(node, new.__getitem__)
    made = GraphModule(module, graph)
    made.meta.update(module.meta)
    return made, needed


def _symbols_in(value: Any) -> set[str]:
    numbers = [*value.shape, *value.stride()] if isinstance(value, torch.Tensor) else [value]
    return {str(symbol) for number in numbers if is_size(number) for symbol in number.node.expr.free_symbols}


def _has_setting(config: Any, name: str) -> bool:
    return name in config.get_config_copy()


def _example(value: Any) -> torch.Tensor:
    """A real tensor of the shape, strides, dtype and device that a fake one has."""
    if not isinstance(value, torch.Tensor):
        raise UnsupportedError(f"an artifact's graphs take tensors, not {type(value).__name__} ({value})")
    if not value.numel():
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
    last = sum((size - 1) * stride for size, stride in zip(value.size(), value.stride(), strict=True))
    storage = blank_storage((last + 1) * value.element_size())
    return torch.empty(0, dtype=value.dtype).set_(storage, 0, value.size(), value.stride())
