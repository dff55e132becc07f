"""What torchspan uses of torch's tracing: symbols, fake tensors, tracing contexts, operators that take functions."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from torchspan.private.names import PrivateName, find, names_in

if TYPE_CHECKING:
    from torch.fx import GraphModule

NAMES = (
    *names_in("torch._dispatch.python", "enable_python_dispatcher"),
    *names_in("torch._export.utils", "_compiling_state_context"),
    *names_in(
        "torch._guards",
        "CompileContext.current_compile_id",
        "TracingContext.extract_stack",
        "TracingContext.get",
        "TracingContext.try_get",
        "detect_fake_mode",
        "tracing",
    ),
    *names_in("torch._higher_order_ops.flex_attention", "sdpa_dense", "sdpa_dense_backward"),
    *names_in("torch._higher_order_ops.utils", "redirect_to_mode", "register_fake"),
    *names_in("torch._higher_order_ops.wrap", "tag_activation_checkpoint"),
    *names_in("torch._subclasses.fake_impls", "op_implementations_dict"),
    *names_in(
        "torch._subclasses.fake_tensor",
        "DataDependentOutputException",
        "DynamicOutputShapeException",
        "FakeTensor",
        "FakeTensorMode",
        "UnsupportedOperatorException",
        "unset_fake_temporarily",
    ),
    *names_in("torch._subclasses.functional_tensor", "FunctionalTensor", "FunctorchFunctionalizeAPI"),
    *names_in("torch.export._tree_utils", "reorder_kwargs"),
    PrivateName("torch.fx.experimental.proxy_tensor"),
    *names_in(
        "torch.fx.experimental.proxy_tensor",
        "ProxyTorchDispatchMode",
        "disable_proxy_modes_tracing",
        "get_proxy_mode",
        "make_fx",
        "maybe_disable_thunkify",
        "track_tensor_tree",
    ),
    *names_in("torch.fx.experimental.proxy_tensor", "autograd_would_have_decomposed", since="2.10"),
    *names_in(
        "torch.fx.experimental.symbolic_shapes",
        "ConstraintViolationError",
        "DimDynamic.DYNAMIC",
        "GuardOnDataDependentSymNode",
        "PropagateUnbackedSymInts",
        "ShapeEnv",
        "compute_unbacked_bindings",
        "free_symbols",
        "free_unbacked_symbols",
        "statically_known_true",
    ),
    *names_in("torch.nn.utils.parametrize", "_inject_new_class", "_inject_property"),
    *names_in("torch.nn.utils.stateless", "_reparametrize_module"),
    PrivateName("torch.utils._pytree"),
    *names_in(
        "torch.utils._pytree",
        "GetAttrKey",
        "TreeSpec",
        "tree_flatten",
        "tree_flatten_with_path",
        "tree_map",
        "tree_map_only",
        "tree_unflatten",
    ),
    *names_in("torch.utils._sympy.printers", "PythonPrinter"),
)


def __getattr__(name: str) -> Any:
    """A listed name, imported when it is asked for."""
    return find(NAMES, name)


def tracing_with(fake_mode: Any) -> AbstractContextManager[Any]:
    """A tracing context, unless there is one: compilers ask it for the fake mode."""
    from torch._guards import TracingContext, tracing

    return nullcontext() if TracingContext.try_get() is not None else tracing(TracingContext(fake_mode))


def real_copy(module: GraphModule) -> GraphModule:
    """A copy of a graph, with the real tensors that it holds, also while a fake mode is on."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        return copy.deepcopy(module)


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


@contextmanager
def with_real_tensors() -> Iterator[None]:
    """Inside, ranks can be computed also while a model is traced with fake tensors or on another default device."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    with unset_fake_temporarily(), disable_proxy_modes_tracing(), torch.device("cpu"):
        yield


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


def trace_fake(
    function: Callable[..., Any], values: Sequence[Any], result: Any, table: Mapping[Any, Callable[..., Any]]
) -> GraphModule | None:
    """`function` of these fake values, which gives what is like `result`, as a graph, its operators taken apart by `table`.

    None where what the table has for one of them decides by a value that depends on data.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._guards import detect_fake_mode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    # the dispatcher in Python: what is not it takes no symbols for sizes
    with torch.no_grad(), detect_fake_mode([*values, result]) or nullcontext(), enable_python_dispatcher():
        try:
            return make_fx(function, decomposition_table=dict(table))(*values)
        except GuardOnDataDependentSymNode:
            return None


def value_errors() -> tuple[type[Exception], ...]:
    """What a trace on fake tensors raises where a program asks for the value of one."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode


def unknown_values() -> tuple[type[Exception], ...]:
    """What an operator raises on fake tensors when only real ones can tell what it gives."""
    from torch._subclasses.fake_tensor import UnsupportedOperatorException

    return *value_errors(), UnsupportedOperatorException, NotImplementedError


def fake_mode() -> Any:
    """A mode for example values of a graph that was written by hand, whose sizes may be symbols."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(shape_env=ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True))


def fake_mode_of(values: Sequence[Any]) -> Any:
    """The mode that fake tensors among `values` belong to, or None."""
    from torch._guards import detect_fake_mode

    return detect_fake_mode([value for value in values if isinstance(value, torch.Tensor)])


def forget_new_sizes(fake_mode: Any, size: Any) -> dict[Any, Any]:
    """Where the data-dependent sizes that were made for `size` are found in it; torch then no longer looks for them."""
    from torch.fx.experimental.symbolic_shapes import compute_unbacked_bindings

    if fake_mode is None or fake_mode.shape_env is None:
        return {}
    return compute_unbacked_bindings(fake_mode.shape_env, size) or {}


@contextmanager
def sizes_may_depend_on_data() -> Iterator[None]:
    """While this is open, a joint export takes a number that a program reads from a tensor for a symbol, not for an error."""
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True))):
        yield


def new_tracing_context() -> Any:
    """A tracing context with fake tensors of its own, as dynamo makes one for each capture; all sizes are fixed."""
    from torch._guards import TracingContext
    from torch._subclasses.fake_tensor import FakeTensorMode

    return TracingContext(FakeTensorMode())


def traced_line() -> str | None:
    """The user's ``file:line`` that dynamo traces in this thread."""
    from torch._guards import TracingContext

    stack = TracingContext.extract_stack() if TracingContext.try_get() else []
    return f"{stack[-1].filename}:{stack[-1].lineno}" if stack else None
