"""torch's private names that backports use, each imported when it is asked for: importing this imports no compiler."""

from __future__ import annotations

import copy
import importlib
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import CodeType, ModuleType
from typing import Any

import torch

_NOT_IN_KEYS = "_cache_config_ignore_prefix"  # inductor's option that names the options which do not matter to its caches


def context_manager_variables() -> ModuleType:
    """Dynamo's classes for context managers that it does not trace into."""
    import torch._dynamo.variables.ctx_manager as module

    return module


def unsupported_by_dynamo(what: str, context: str, explanation: str) -> None:
    """Raise dynamo's own error for code that it cannot trace."""
    from torch._dynamo import exc

    getattr(exc, "unimplemented_v2", exc.unimplemented)(gb_type=what, context=context, explanation=explanation, hints=[])


def constant_variable(value: Any) -> Any:
    """Dynamo's variable for a constant."""
    from torch._dynamo.variables import ConstantVariable

    return ConstantVariable.create(value)


def has_inductor_option(name: str) -> bool:
    """Whether inductor's configuration has an entry of this name."""
    import torch._inductor.config as config

    return hasattr(config, name)


def inductor_options(options: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Inductor's configuration with these entries, inside the block."""
    import torch._inductor.config as config

    return config.patch(dict(options))


def compile_part(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a part of a graph with inductor, for inputs of these (fake) values; shapes stay as dynamic as they are.

    Inside a compile of torch's, the part shares its shape environment; outside, one is taken from the inputs.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor import standalone_compile

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())  # the graph around it has its backward already
        if TracingContext.try_get() is None:
            fake_mode, inputs = _in_one_fake_mode(inputs)
            stack.enter_context(tracing(TracingContext(fake_mode)))
        return standalone_compile(module, list(inputs), dynamic_shapes="from_tracing_context")


def _in_one_fake_mode(inputs: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    """The fake mode that the inputs share, and the inputs; where they share none, a new one and fake inputs of equal shapes."""
    from torch._subclasses import FakeTensor, FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    modes = {value.fake_mode if isinstance(value, FakeTensor) else None for value in tensors}
    if len(modes) == 1 and None not in modes:
        return modes.pop(), inputs
    fake_mode = FakeTensorMode(shape_env=ShapeEnv())  # a trace with real tensors gives each value a mode of its own
    with fake_mode:
        return fake_mode, [
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            if isinstance(value, torch.Tensor)
            else value
            for value in inputs
        ]


def tensors_as_indices() -> AbstractContextManager[None]:
    """Lets functions under vmap index a tensor with a tensor, as attention's score and mask functions do."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    return TransformGetItemToIndex()


def inductor_option(name: str) -> Any:
    """The value of an entry of inductor's configuration; its name may be dotted."""
    import torch._inductor.config as config

    return config.__getattr__(name)


class ExtendedOptions(dict[str, Any]):
    """A table of options with some more; `native` is the table that torch has."""

    def __init__(self, native: dict[str, Any], more: Mapping[str, Any]) -> None:
        super().__init__({**native, **more})
        self.native = native


def has_native_option(module: ModuleType, name: str) -> bool:
    """Whether the configuration `module` has an entry of this name by itself; says the same while it is extended."""
    entries = vars(module)["_config"]
    while isinstance(entries, ExtendedOptions):
        entries = entries.native
    return name in entries


def with_options(
    options: Mapping[str, Any], left_out_by: str | None = _NOT_IN_KEYS
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Makes a table of options one that also has these, with their defaults.

    They do not enter keys of caches: the option `left_out_by` lists them (None: they enter).
    """

    def extend(entries: dict[str, Any]) -> dict[str, Any]:
        missing = {name: value for name, value in options.items() if name not in entries}
        if not missing:
            return entries
        new = {name: _option(value) for name, value in missing.items()}
        if left_out_by is not None:
            new[left_out_by] = _with_more_names(entries.get(left_out_by) or _option([]), list(missing))
        return ExtendedOptions(entries, new)

    return extend


def _option(default: Any) -> Any:
    import torch.utils._config_module as module

    make: Any = module._ConfigEntry
    config: Any = module._Config
    return make(config(default=default, value_type=None if default is None else type(default)))


def _with_more_names(entry: Any, names: list[str]) -> Any:
    extended = copy.copy(entry)
    for place in ("default", "user_override"):  # the second is a copy of the first once that has been read
        if isinstance(there := getattr(extended, place), list):
            setattr(extended, place, [*there, *names])
    return extended


def dynamo_option(name: str) -> Any:
    """The value of an entry of dynamo's configuration."""
    import torch._dynamo.config as config

    return config.__getattr__(name)


def dynamo_unsupported() -> type[Exception]:
    """What dynamo raises for code that it cannot trace."""
    from torch._dynamo.exc import Unsupported

    return Unsupported


def aot_option(name: str) -> Any:
    """The value of an entry of AOTAutograd's configuration."""
    import torch._functorch.config as config

    return config.__getattr__(name)


def refuse_to_cache_joint_graph(cause: str) -> None:
    """Raise what makes AOTAutograd compile a program anew and keep nothing of it in its cache."""
    from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache

    raise BypassAOTAutogradCache(cause)


def option_group(name: str) -> Callable[[Any], Any]:
    """Makes what stands for the options ``name.…`` in inductor's configuration, where it has none."""

    def make(group: Any) -> Any:
        import torch._inductor.config as config
        from torch.utils._config_module import SubConfigProxy

        return SubConfigProxy(config, f"{name}.") if group is None else group

    return make


def register_in_modes(operator: Any, fake_outputs: Callable[..., Any], as_constant: Callable[[Any], int]) -> None:
    """Give an operator that takes a function and its inputs to the modes of selective checkpointing and of tracing.

    `fake_outputs` computes them for fake inputs; `as_constant` is what stands for the function in a traced graph.
    """
    from torch._higher_order_ops.utils import redirect_to_mode, register_fake
    from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, track_tensor_tree
    from torch.utils._pytree import tree_map
    from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

    redirect_to_mode(operator, _CachingTorchDispatchMode)
    redirect_to_mode(operator, _CachedTorchDispatchMode)
    register_fake(operator, fake_outputs)

    @operator.py_impl(ProxyTorchDispatchMode)
    def traced(mode: Any, function: Any, inputs: Any, **kwargs: Any) -> Any:
        outputs = operator(function, inputs, **kwargs)
        arguments = (as_constant(function), tree_map(mode.tracer.unwrap_proxy, inputs))
        proxy = mode.tracer.create_proxy("call_function", operator, arguments, kwargs)
        return track_tensor_tree(outputs, proxy, constant=None, tracer=mode.tracer)


def asks_for_option(callback: Any, name: str) -> bool:
    """Whether what dynamo calls for a frame leads to an inductor with the option `name` set."""
    while inner := getattr(callback, "_torchdynamo_orig_callable", getattr(callback, "_torchdynamo_orig_backend", None)):
        callback = inner
    options = getattr(callback, "config", None)
    return bool(options.get(name) if isinstance(options, dict) else None) or bool(inductor_option(name))


def is_only_checkpointing() -> bool:
    """Whether the only dispatch modes in force are torch's own and, at least one, of selective checkpointing."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
    from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

    modes = [mode for mode in _get_current_dispatch_mode_stack() if not mode.is_infra_mode()]
    return bool(modes) and all(isinstance(mode, (_CachedTorchDispatchMode, _CachingTorchDispatchMode)) for mode in modes)


@contextmanager
def as_if_without_modes() -> Iterator[None]:
    """Inside, dynamo does not hold dispatch modes for a reason to leave code uncompiled."""
    import torch.utils._python_dispatch as state

    before = state._is_in_non_infra_torch_dispatch_mode
    state._is_in_non_infra_torch_dispatch_mode = False
    try:
        yield
    finally:
        state._is_in_non_infra_torch_dispatch_mode = before


@dataclass(frozen=True)
class Captured:
    """What dynamo made of a frame: the bytecode, which calls the graph's `module` by `graph_name`, and how it was traced."""

    code: CodeType
    module: torch.fx.GraphModule
    graph_name: str
    fake_mode: Any
    tensor_to_context: Any

    def tracing_context(self) -> Any:
        """A context to trace the graph further in."""
        from torch._guards import TracingContext

        context = TracingContext(self.fake_mode)
        context.tensor_to_context = self.tensor_to_context
        return context


def capture_frame(frame: Any, constraints: Sequence[Any] | None) -> Captured | None:
    """What dynamo makes of a `frame`, without running it; None where it finds no work on tensors."""
    from torch._dynamo import config
    from torch._dynamo.convert_frame import convert_frame_assert
    from torch._dynamo.hooks import Hooks
    from torch._dynamo.utils import CleanupManager
    from torch._guards import TracingContext

    seen: dict[str, Any] = {}

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        context = TracingContext.get()
        seen.update(module=module, fake_mode=context.fake_mode, tensor_to_context=context.tensor_to_context)
        return module.forward

    given: Any = constraints
    convert = convert_frame_assert(backend, export_constraints=given)
    with config.patch(automatic_dynamic_shapes=False), compiling_for_export():
        done = convert(frame, None, Hooks(guard_filter_fn=lambda guards: [False] * len(guards)), {})
    guarded: Any = getattr(done, "guarded_code", done)
    if guarded is None or not seen:
        return None
    # the frame's names are its own, and go when they go: dynamo's clean-up at exit would find half of them
    CleanupManager.instance.values.pop(id(guarded.code), None)
    CleanupManager.instance.refs.pop(id(guarded.code), None)
    graph_name = next(name for name in guarded.code.co_names if name.startswith("__compiled_fn"))
    return Captured(code=guarded.code, graph_name=graph_name, **seen)


def compiling_for_export() -> AbstractContextManager[None]:
    """Inside, programs that ask whether they are being compiled or exported are told so."""
    from torch._export.utils import _compiling_state_context

    return _compiling_state_context()


@contextmanager
def without_outside_changes(changed: list[str]) -> Iterator[None]:
    """Inside, bytecode that dynamo writes in this thread changes no Python object that the program was given.

    The sources of those that the program itself changes are added to `changed`.
    """
    from torch._dynamo.side_effects import SideEffects
    from torch._dynamo.variables.base import AttributeMutationNew

    effects: Any = SideEffects
    original, hooks, thread = effects.codegen_update_mutated, effects.codegen_hooks, threading.get_ident()

    def write(self: Any, cg: Any, *args: Any, **kwargs: Any) -> None:
        if threading.get_ident() != thread:
            return original(self, cg, *args, **kwargs)
        modified = self._get_modified_vars()
        new = [variable for variable in modified if isinstance(variable.mutation_type, AttributeMutationNew)]
        names = (source_name(variable.source) for variable in modified if variable not in new)
        changed.extend(name for name in names if name not in changed)
        self._get_modified_vars = lambda: new
        try:
            return original(self, cg, *args, **kwargs)
        finally:
            del self._get_modified_vars

    effects.codegen_update_mutated = write
    effects.codegen_hooks = lambda self, cg: None if threading.get_ident() == thread else hooks(self, cg)
    try:
        yield
    finally:
        effects.codegen_update_mutated, effects.codegen_hooks = original, hooks


def source_name(source: Any) -> str:
    """A dynamo source as an expression; a method before torch 2.10."""
    return source.name() if callable(source.name) else source.name


def check_example_inputs(leaves: Sequence[Any]) -> None:
    """Raise dynamo's error for a user's mistake unless each is something that a graph can take."""
    from torch._dynamo.exc import UserError, UserErrorType
    from torch._dynamo.utils import common_constant_types

    allowed = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, torch._C.ScriptObject, *common_constant_types)
    for leaf in leaves:
        if leaf is not None and not isinstance(leaf, allowed):
            raise UserError(
                UserErrorType.INVALID_INPUT,
                f"an example argument holds a {type(leaf).__name__}, which is not supported; expected tensors, numbers, "
                "strings and None, also in containers; register other classes with torch.utils._pytree.register_pytree_node",
            )


# AOTAutograd


def aot_autograd() -> Any:
    """The module of AOTAutograd's entry points."""
    import torch._functorch.aot_autograd as module

    return module


def aot_runtime() -> Any:
    """The module of AOTAutograd that traces, partitions and compiles."""
    return importlib.import_module("torch._functorch._aot_autograd.jit_compile_runtime_wrappers")


@contextmanager
def in_calls_with(marker: object, module: Any, functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Inside, these functions of a module or class stand for its own in calls that get `marker`; others get its own."""
    own = {name: getattr(module, name) for name in functions}
    before = {name: vars(module)[name] for name in functions}  # of a class, a static method

    def choose(name: str, *args: Any, **kwargs: Any) -> Any:
        is_marked = any(value is marker for value in (*args, *kwargs.values()))
        return (functions if is_marked else own)[name](*args, **kwargs)

    for name in functions:
        setattr(module, name, partial(choose, name))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)


def aot_config(
    flat_args: Sequence[Any], num_state: int, decompositions: Any, keep_inference_input_mutations: bool, ignore_shape_env: bool
) -> Any:
    """AOTAutograd's settings for a graph of these arguments, parameters and buffers first, without compilers."""
    from torch._functorch._aot_autograd.schemas import AOTConfig
    from torch._subclasses import FakeTensor

    no_compiler: Any = None
    fake = next((value for value in flat_args if isinstance(value, FakeTensor)), None)
    return AOTConfig(
        fw_compiler=no_compiler,
        bw_compiler=no_compiler,
        inference_compiler=no_compiler,
        partition_fn=no_compiler,
        decompositions=decompositions,
        num_params_buffers=num_state,
        aot_id=next(aot_autograd().AOT_COUNTER),
        keep_inference_input_mutations=keep_inference_input_mutations,
        dynamic_shapes=fake is not None and fake.fake_mode.shape_env is not None,
        static_input_indices=[*range(num_state)],
        ignore_shape_env=ignore_shape_env,
    )


def aot_contexts(fake_mode: Any, shape_env: Any) -> Iterator[AbstractContextManager[Any]]:
    """The contexts in which AOTAutograd traces and compiles."""
    from torch._dispatch.python import enable_python_dispatcher
    from torch._dynamo.utils import _disable_saved_tensors_hooks_during_tracing, preserve_rng_state

    yield torch.autograd.set_multithreading_enabled(False)
    yield preserve_rng_state()
    yield fake_mode
    if shape_env is not None:
        yield enable_python_dispatcher()
    yield aot_autograd().PhiloxStateTracker()
    yield _disable_saved_tensors_hooks_during_tracing()
    yield compiled_autograd_off()


def compiled_autograd_off() -> AbstractContextManager[None]:
    """Inside, autograd runs as it is."""
    from torch._dynamo import compiled_autograd

    return compiled_autograd._disable()


def tracing_with(fake_mode: Any) -> AbstractContextManager[Any]:
    """A tracing context, unless there is one: compilers ask it for the fake mode."""
    from torch._guards import TracingContext, tracing

    return nullcontext() if TracingContext.try_get() is not None else tracing(TracingContext(fake_mode))


def tell_tracing_context(state: list[torch.Tensor]) -> None:
    """Note the parameters and buffers where compilers look for them."""
    from torch._functorch._aot_autograd.subclass_utils import unwrap_tensor_subclasses_with_indices_to_original
    from torch._guards import TracingContext

    context: Any = TracingContext.try_get()
    if context is not None:
        context.params_flat = state
        unwrapped = unwrap_tensor_subclasses_with_indices_to_original(state)
        context.params_flat_unwrap_subclasses, context.params_unwrapped_to_flat_index = unwrapped


def call_with_state(
    module: torch.nn.Module, state: dict[str, torch.Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Call a module with these parameters and buffers; a graph is interpreted, so that its nodes' metadata is kept."""
    from torch._guards import detect_fake_mode
    from torch.fx.experimental.proxy_tensor import maybe_disable_thunkify
    from torch.fx.experimental.symbolic_shapes import PropagateUnbackedSymInts
    from torch.nn.utils import stateless

    with stateless._reparametrize_module(module, state), maybe_disable_thunkify():
        if not isinstance(module, torch.fx.GraphModule):
            return module(*args, **kwargs)
        with torch.fx.traceback.preserve_node_meta(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Anomaly Detection has been enabled.")
            with torch.autograd.detect_anomaly(check_nan=False):  # it notes which forward node a backward node belongs to
                fake_mode: Any = detect_fake_mode()
                fake_mode.epoch += 1
                return PropagateUnbackedSymInts(module).run(*args)


def flattened(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Callable[..., Any], Any]:
    """`function` from flat arguments to flat results, and what holds the structure of its result once it has run."""
    from torch._functorch._aot_autograd.utils import create_tree_flattened_fn

    return create_tree_flattened_fn(function, args, dict(kwargs))


def in_order(kwargs: dict[str, Any], spec: Any) -> dict[str, Any]:
    """Arguments by name in the order of a structure of (args, kwargs)."""
    from torch.export._tree_utils import reorder_kwargs

    return reorder_kwargs(kwargs, spec)


def share_memory(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether two plain tensors are of one memory."""
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if is_traceable_wrapper_subclass(one) or is_traceable_wrapper_subclass(two):
        return False
    return StorageWeakRef(one.untyped_storage()) == StorageWeakRef(two.untyped_storage())


def keep_forward_traces(outputs: Sequence[Any]) -> None:
    """Make the backward of these tensors note for its nodes which nodes of the forward they belong to."""
    from torch._functorch._aot_autograd.logging_utils import setup_stacktrace_preservation_hooks

    roots: list[Any] = [tensor.grad_fn for tensor in outputs if isinstance(tensor, torch.Tensor)]
    setup_stacktrace_preservation_hooks(roots)


def partitioners() -> Any:
    """The module that cuts a joint graph into forward and backward."""
    import torch._functorch.partitioners as module

    return module


def unbacked_fallback() -> int:
    """The size that inductor takes for one that nobody knows."""
    from torch._inductor import config

    return int(config.unbacked_symint_fallback)


def constant_to_dynamo(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose result dynamo takes for a constant; torch._dynamo.assume_constant_result, without an import."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def opaque_to_dynamo(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which dynamo does not look into: it is traced by what comes after it."""
    from torch._dynamo import nonstrict_trace

    return nonstrict_trace(function)


@contextmanager
def compiling_backward(config: Any) -> Iterator[None]:
    """The contexts in which AOTAutograd compiles a backward."""
    from torch._functorch._aot_autograd.logging_utils import track_graph_compiling

    with track_graph_compiling(config, "backward"), torch._C._DisableAutocast(), torch.no_grad():
        yield


def real_copy(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy of a graph, with the real tensors that it holds, also while a fake mode is on."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        return copy.deepcopy(module)


def is_functional(value: object) -> bool:
    """Whether a value is a tensor as functionalization wraps it while it traces."""
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(value, FunctionalTensor)


def in_memory_format(tensor: torch.Tensor, memory_format: Any) -> torch.Tensor:
    """`tensor` with the strides that AOTAutograd has noted for it."""
    from torch._functorch._aot_autograd.runtime_wrappers import coerce_to_expected_memory_format

    return coerce_to_expected_memory_format(tensor, memory_format)


@contextmanager
def with_real_tensors() -> Iterator[None]:
    """Inside, ranks can be computed also while a model is traced with fake tensors or on another default device."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    with unset_fake_temporarily(), disable_proxy_modes_tracing(), torch.device("cpu"):
        yield
