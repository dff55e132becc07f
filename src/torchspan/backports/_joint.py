"""``aot_export_joint_with_descriptors`` and ``aot_compile_joint_with_descriptors``: AOTAutograd in two steps.

The first step traces a module's forward and backward as one joint graph, the second partitions and compiles it. Old torch does
both in one function: it is run twice here, once until it has the graph, and once from there, with the graph that it is given.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from torchspan.backports import _descriptor_order as descriptor_order
from torchspan.backports import _descriptors as descriptors
from torchspan.core.errors import UnsupportedError
from torchspan.core.replaced import in_calls_with
from torchspan.private import aot, dispatch, dynamo, fx

_PLACE = "torch._functorch.aot_autograd"


@dataclass
class AOTState:
    """What the second step goes on from: AOTAutograd's own arguments of it, and what each input means."""

    needs_autograd: bool
    flat_args: list[Any]
    flat_args_descs: list[descriptors.AOTInput]
    fw_metadata: Any
    aot_config: Any
    stack: ExitStack
    fake_mode: Any
    function: Callable[..., Any] = field(repr=False)


@dataclass
class AOTGraphCapture:
    """A traced graph, its example inputs (of a joint graph: primals and tangents), and what those mean."""

    wrappers: list[Any]
    graph_module: GraphModule
    updated_flat_args: Any
    updated_flat_args_descs: Any
    maybe_subclass_meta: Any


@dataclass
class JointWithDescriptors:
    """A joint graph; ``meta["desc"]`` of its placeholders and of its output says what each input and output means.

    ``params_spec`` and ``buffers_spec`` are the names of the parameters and buffers in the order in which the compiled function
    takes them, before the arguments of the module.
    """

    _aot_state: AOTState
    _aot_graph_capture: AOTGraphCapture
    params_spec: list[str]
    buffers_spec: list[str]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec

    @property
    def graph_module(self) -> GraphModule:
        """The joint graph; a pass may put another in its place."""
        return self._aot_graph_capture.graph_module

    @graph_module.setter
    def graph_module(self, value: GraphModule) -> None:
        self._aot_graph_capture.graph_module = value

    @property
    def fake_mode(self) -> Any:
        """The mode of the graph's example values."""
        return self._aot_state.fake_mode


def boxed_nop_preserve_node_meta(fx_g: GraphModule, example_inputs: Sequence[Any]) -> Callable[[list[Any]], Any]:
    """A compiler that interprets the graph, so that what traces the interpretation sees the metadata of its nodes."""

    def run(args: list[Any]) -> Any:
        with torch.fx.traceback.preserve_node_meta():
            return torch.fx.Interpreter(fx_g).boxed_run(args)

    vars(run)["_boxed_call"] = True
    return run


def aot_export_joint_with_descriptors(
    stack: ExitStack,
    mod: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    decompositions: dict[Any, Callable[..., Any]] | None = None,
    keep_inference_input_mutations: bool = False,
    ignore_shape_env: bool = False,
    disable_functionalization: bool = False,
    _record_nn_module_stack: bool = False,
    _disable_torch_fn_metadata_mode: bool = False,
) -> JointWithDescriptors:
    """The joint graph of forward and backward of `mod` for these arguments.

    Its inputs are the plain tensors that parameters, buffers, arguments and tangents consist of, its outputs those of what
    `mod` returns, writes and the gradients; descriptors say which is which. Where nothing needs a gradient, it is a forward.

    Args:
        stack: gets the contexts of the trace, fake tensors first of all.
        mod: a module; all that it returns is flattened.
        args: its example arguments, tensor subclasses too.
        kwargs: its example arguments by name.
        decompositions: replaces operators while the graph is traced.
        keep_inference_input_mutations: whether a forward may write its inputs itself.
        ignore_shape_env: whether real inputs become static shapes although a shape environment is there.

    Raises:
        UnsupportedError: `disable_functionalization`, which this torch cannot.
    """
    if disable_functionalization:
        raise UnsupportedError(
            f"disable_functionalization: torch {torch.__version__}'s AOTAutograd always makes graphs functional; torch can "
            "leave it out since 2.11.0; leave the argument away"
        )
    entry = aot.aot_autograd
    kwargs = kwargs or {}
    parameters = dict(mod.named_parameters(remove_duplicate=False))
    buffers = dict(mod.named_buffers(remove_duplicate=False))
    state = [*parameters.values(), *buffers.values()]
    aot.note_state(state)
    call, out_spec = _flat_function(mod, [*parameters, *buffers], (*state, *args), kwargs, _record_nn_module_stack)
    flat_args, in_spec = pytree.tree_flatten(((*state, *args), kwargs))
    plain = (descriptors.PlainAOTInput(index) for index in range(len(flat_args) - len(state)))
    primals: list[descriptors.AOTInput] = [
        *map(descriptors.ParamAOTInput, parameters),
        *map(descriptors.BufferAOTInput, buffers),
        *plain,
    ]
    config = aot.config_for(flat_args, len(state), decompositions, keep_inference_input_mutations, ignore_shape_env)
    fake_mode, shape_env = entry.construct_fake_mode(flat_args, config)
    fake_args = entry.process_inputs(flat_args, config, fake_mode, shape_env, ignore_shape_env)
    with aot.compiled_autograd_off(), _stopping_at_the_graph(config) as traces:
        entry.create_aot_dispatcher_function(call, fake_args, config, fake_mode, shape_env)
    traced = traces[0]
    _enter_contexts(stack, fake_mode, shape_env)
    aot_state = AOTState(
        traced.needs_autograd, traced.flat_args, primals, traced.outer_metadata, config, stack, fake_mode, traced.function
    )
    capture = AOTGraphCapture(traced.wrappers, traced.graph, traced.example_inputs, None, traced.subclass_meta)
    capture.updated_flat_args_descs = _describe(traced, _remaining(primals, traced))
    return JointWithDescriptors(aot_state, capture, [*parameters], [*buffers], in_spec, out_spec.spec)


def aot_compile_joint_with_descriptors(
    jd: JointWithDescriptors,
    *,
    partition_fn: Callable[..., Any] | None = None,
    fw_compiler: Callable[..., Any] | None = boxed_nop_preserve_node_meta,
    bw_compiler: Callable[..., Any] | None = boxed_nop_preserve_node_meta,
    serializable: bool = False,
) -> Callable[..., Any]:
    """A function of the parameters, the buffers and the module's arguments that runs the joint graph, partitioned and compiled.

    Args:
        jd: what `aot_export_joint_with_descriptors` returned; its graph may have been changed by passes.
        partition_fn: cuts the joint graph into forward and backward; torch's default partition by default.
        fw_compiler: makes a callable of the forward and its example inputs.
        bw_compiler: the same for the backward; None is `fw_compiler`.

    Raises:
        UnsupportedError: `serializable`, which this torch cannot.
    """
    if serializable:
        raise UnsupportedError(
            f"aot_compile_joint_with_descriptors(serializable=True): torch {torch.__version__} has nothing to save such a "
            "function in; torch has it since 2.11.0; save an artifact with torchspan.precompile instead"
        )
    entry = aot.aot_autograd
    state, config = jd._aot_state, jd._aot_state.aot_config
    config.partition_fn = partition_fn or entry.default_partition
    config.fw_compiler = config.inference_compiler = fw_compiler or boxed_nop_preserve_node_meta
    config.bw_compiler = bw_compiler or config.fw_compiler
    with ExitStack() as stack:
        _enter_contexts(stack, state.fake_mode, state.fake_mode.shape_env)
        stack.enter_context(fx.tracing_with(state.fake_mode))
        stack.enter_context(_going_on_from(jd))
        finish = entry.aot_dispatch_autograd if state.needs_autograd else entry.aot_dispatch_base
        compiled, _ = finish(state.function, state.flat_args, config, fw_metadata=state.fw_metadata)

    @dynamo.nonstrict_trace
    def call(*args: Any, **kwargs: Any) -> Any:
        flat_args = pytree.tree_leaves((args, fx.reorder_kwargs(kwargs, jd.in_spec)))
        return pytree.tree_unflatten(compiled(flat_args), jd.out_spec)

    return call


for _public in (JointWithDescriptors, boxed_nop_preserve_node_meta, aot_export_joint_with_descriptors):
    _public.__module__ = _PLACE
aot_compile_joint_with_descriptors.__module__ = _PLACE


# the first step


def _flat_function(
    module: torch.nn.Module, names: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any], record_stack: bool
) -> tuple[Callable[..., Any], Any]:
    """A function of flat tensors, the state with these `names` first, and what will hold the structure of its result."""

    def call(*args: Any, **kwargs: Any) -> Any:
        state, args = dict(zip(names, args)), args[len(names) :]
        if kwargs and isinstance(module, GraphModule):  # an interpreter takes positions only
            args, kwargs = (*args, *_in_positions(module, len(args), kwargs)), {}
        return fx.call_with_state(module, state, args, kwargs)

    if record_stack:
        vars(call)["_orig_mod"] = module
    return aot.create_tree_flattened_fn(call, args, dict(kwargs))


def _in_positions(module: GraphModule, num_args: int, kwargs: Mapping[str, Any]) -> list[Any]:
    """The values of `kwargs` in the order in which the graph takes them, after its first `num_args`."""
    codegen = module.graph._codegen
    names = getattr(codegen, "argument_names", None) or [node.target for node in module.graph.find_nodes(op="placeholder")]
    return [kwargs[name] for name in names[num_args:] if name in kwargs]


def _remaining(primals: list[descriptors.AOTInput], traced: _Traced) -> list[descriptors.AOTInput]:
    """The descriptors of the arguments that AOTAutograd keeps, without duplicates, and with bases in place of views."""
    if len(traced.kept_args) == len(primals):
        return primals
    known = {id(value): primal for value, primal in reversed([*zip(traced.flat_args, primals)])}
    kept: list[descriptors.AOTInput] = []
    for index, value in enumerate(traced.kept_args):
        primal = known.get(id(value))
        kept.append(primal if primal is not None else _base(index, value, [*zip(traced.flat_args, primals)]))
    return kept


def _base(index: int, base: Any, inputs: list[tuple[Any, descriptors.AOTInput]]) -> descriptors.AOTInput:
    """The descriptor of a tensor that AOTAutograd made for the views of one memory."""
    for value, primal in inputs:
        if isinstance(value, torch.Tensor) and isinstance(base, torch.Tensor):
            if value._base is base:
                return descriptors.ViewBaseAOTInput(primal)
            if _share_memory(value, base):
                return descriptors.SyntheticBaseAOTInput(primal)
    return descriptors.DummyAOTInput(index)


def _share_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two plain tensors are of one memory."""
    from torch.multiprocessing.reductions import StorageWeakRef

    if dispatch.is_traceable_wrapper_subclass(first) or dispatch.is_traceable_wrapper_subclass(second):
        return False
    return StorageWeakRef(first.untyped_storage()) == StorageWeakRef(second.untyped_storage())


def _describe(traced: _Traced, primals: list[descriptors.AOTInput]) -> Any:
    """Write ``meta["desc"]`` of the graph; returns the descriptors of its inputs in the structure of its example inputs."""
    forward = descriptor_order.forward_outputs(traced, primals)
    placeholders, output = traced.graph.graph.find_nodes(op="placeholder"), traced.graph.graph.output_node()
    inputs: Any = descriptor_order.joint_inputs(traced, primals)
    flat = [*inputs[0], *inputs[1]] if traced.needs_autograd else inputs[0]
    outputs = [*forward, *descriptor_order.gradients(traced, primals)] if traced.needs_autograd else forward
    flat += [descriptors.DummyAOTInput(index) for index in range(len(flat), len(placeholders))]
    for node, descriptor in zip(placeholders, flat):
        node.meta["desc"] = descriptor
    values = pytree.arg_tree_leaves(*output.args)
    outputs += [descriptors.DummyAOTOutput(index) for index in range(len(outputs), len(values))]
    output.meta["desc"] = [
        None if value is None and descriptor.is_grad() else descriptor for value, descriptor in zip(values, outputs)
    ]
    return inputs if traced.needs_autograd else inputs[0]


# AOTAutograd's one function, run in two parts


@dataclass
class _Traced:
    """What AOTAutograd has when it has traced a graph: what it began with, and what it made of that for its graph."""

    needs_autograd: bool
    function: Callable[..., Any]
    flat_args: list[Any]
    outer_metadata: Any
    kept_args: list[Any]
    fw_metadata: Any
    wrappers: list[Any]
    graph: GraphModule
    example_inputs: Any
    subclass_meta: Any


@contextmanager
def _stopping_at_the_graph(config: Any) -> Iterator[list[_Traced]]:
    """Inside, AOTAutograd traces a graph for `config` and returns without compiling it; what it has then is in the list."""
    runtime = aot.jit_compile_runtime_wrappers
    traces: list[_Traced] = []

    def trace(needs_autograd: bool, function: Any, flat_args: Any, config: Any, *, fw_metadata: Any) -> tuple[None, Any]:
        wrappers = runtime._create_wrappers_for_dispatch(needs_autograd=needs_autograd)
        arguments = [*flat_args]
        inner, kept, inner_metadata = runtime.pre_compile(wrappers, function, flat_args, config, fw_metadata=fw_metadata)
        trace_graph = runtime.aot_dispatch_autograd_graph if needs_autograd else runtime.aot_dispatch_base_graph
        parts = trace_graph(inner, kept, config, fw_metadata=inner_metadata)
        traces.append(_Traced(needs_autograd, function, arguments, fw_metadata, kept, inner_metadata, wrappers, *parts))
        return None, fw_metadata

    changes = {
        "aot_dispatch_autograd": functools.partial(trace, True),
        "aot_dispatch_base": functools.partial(trace, False),
    }
    with in_calls_with(config, aot.aot_autograd, changes):
        yield traces


@contextmanager
def _going_on_from(jd: JointWithDescriptors) -> Iterator[None]:
    """Inside, AOTAutograd takes the graph of `jd` in place of tracing one; compilers that it calls may trace others."""
    capture, config = jd._aot_graph_capture, jd._aot_state.aot_config

    def traced(*args: Any, **kwargs: Any) -> tuple[GraphModule, Any, Any]:
        return capture.graph_module, capture.updated_flat_args, capture.maybe_subclass_meta

    changes = {"aot_dispatch_autograd_graph": traced, "aot_dispatch_base_graph": traced}
    runtime = aot.jit_compile_runtime_wrappers
    finish = {"post_compile": functools.partial(_with_backward, runtime.AOTDispatchAutograd.post_compile)}
    with (
        in_calls_with(config, runtime, changes),
        in_calls_with(config, runtime.AOTDispatchAutograd, finish),
    ):
        yield


def _with_backward(post_compile: Callable[..., Any], forward: Any, backward: Any, *args: Any, **kwargs: Any) -> Any:
    """AOTAutograd's last step, with the backward compiled now: it would be at the first call of it."""
    arguments = inspect.signature(post_compile).bind(forward, backward, *args, **kwargs).arguments
    lazy, config = arguments["lazy_backward_info"], arguments["aot_config"]
    if backward is None and lazy is not None:
        with aot.compiling_backward(config):
            backward = config.bw_compiler(fx.real_copy(lazy.bw_module), lazy.placeholder_list)
    return post_compile(forward, backward, *args, **kwargs)


def _enter_contexts(stack: ExitStack, fake_mode: Any, shape_env: Any) -> None:
    """The contexts that AOTAutograd traces and compiles in."""
    for context in aot.contexts(fake_mode, shape_env):
        stack.enter_context(context)
