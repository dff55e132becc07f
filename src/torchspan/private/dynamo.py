"""What torchspan uses of dynamo, torch's capture of bytecode: `torch._dynamo`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torchspan.private.names import PrivateName, find, names_in

if TYPE_CHECKING:
    from torch.fx import GraphModule

NAMES = (
    *names_in("torch._dynamo", "mark_dynamic", "maybe_mark_dynamic", "nonstrict_trace", "reset", "run"),
    *names_in("torch._dynamo._trace_wrapped_higher_order_op", "TransformGetItemToIndex"),
    *names_in("torch._dynamo.backends.common", "aot_autograd"),
    *names_in("torch._dynamo.backends.registry", "_COMPILER_FNS", "lookup_backend"),
    *names_in(
        "torch._dynamo.callback",
        "callback_handler.register_start_callback",
        "callback_handler.register_end_callback",
        "callback_handler.remove_start_callback",
        "callback_handler.remove_end_callback",
    ),
    *names_in("torch._dynamo.compiled_autograd", "_disable"),
    PrivateName("torch._dynamo.config"),
    *names_in(
        "torch._dynamo.config",
        "allow_rnn",
        "assume_static_by_default",
        "automatic_dynamic_shapes",
        "guard_nn_modules",
        "optimize_ddp",
        "recompile_limit",
        "specialize_float",
        "specialize_int",
        "skip_nnmodule_hook_guards",
        "guard_nn_modules_using_dict_tags",
        "ignore_logger_methods",
        "skip_no_tensor_aliasing_guards_on_parameters",
        "skip_tensor_guards_with_matching_dict_tags",
    ),
    *names_in("torch._dynamo.config", "ignore_logging_functions", "trace_autograd_ops", since="2.11"),
    *names_in("torch._dynamo.config", "use_recursive_dict_tags_for_guards", since="2.9"),
    *names_in("torch._dynamo.convert_frame", "convert_frame_assert"),
    *names_in("torch._dynamo.debug_utils", "NNModuleToString.convert"),
    *names_in("torch._dynamo.eval_frame", "_debug_get_cache_entry_list"),
    *names_in("torch._dynamo.exc", "TorchDynamoException", "Unsupported", "UserError", "UserErrorType", "unimplemented"),
    *names_in("torch._dynamo.exc", "unimplemented_v2", until="2.9"),
    *names_in("torch._dynamo.guards", "GuardBuilder.get"),
    *names_in("torch._dynamo.hooks", "Hooks"),
    *names_in("torch._dynamo.output_graph", "OutputGraph.call_user_compiler", "OutputGraph.compile_subgraph"),
    *names_in("torch._dynamo.pgo", "auto_dynamic"),
    *names_in(
        "torch._dynamo.side_effects",
        "SideEffects.codegen_update_mutated",
        "SideEffects.codegen_hooks",
        "SideEffects.is_modified",
        "SideEffects._get_modified_vars",
    ),
    *names_in("torch._dynamo.symbolic_convert", "InstructionTranslator.current_tx"),
    PrivateName("torch._dynamo.utils"),
    *names_in(
        "torch._dynamo.utils",
        "CleanupManager.instance",
        "ChromiumEventLogger._log_timed_event",
        "DEFAULT_COMPILATION_METRICS_LIMIT",
        "clear_compilation_metrics",
        "common_constant_types",
        "counters",
        "get_compilation_metrics",
        "set_compilation_metrics_limit",
    ),
    *names_in(
        "torch._dynamo.variables",
        "ConstDictVariable.getitem_const_raise_exception_if_absent",
        "ConstantVariable.create",
        "PythonModuleVariable",
        "UnspecializedNNModuleVariable",
        "UserDefinedClassVariable",
        "UserDefinedObjectVariable",
    ),
    *names_in("torch._dynamo.variables.base", "AttributeMutationNew", "ValueMutationNew", "VariableTracker.call_obj_hasattr"),
    *names_in("torch._dynamo.variables.base", "VariableTracker.var_getattr", until="2.13"),
    *names_in("torch._dynamo.variables.base", "VariableTracker.tp_getattro_impl", since="2.14"),
    PrivateName("torch._dynamo.variables.builder"),
    *names_in("torch._dynamo.variables.builder", "VariableBuilder.wrap_symint", "process_automatic_dynamic"),
    *names_in("torch._dynamo.variables.ctx_manager", "ContextWrappingVariable"),
)


def __getattr__(name: str) -> Any:
    """A listed name, imported when it is asked for."""
    return find(NAMES, name)


def refuse(what: str, context: str, explanation: str) -> None:
    """Raise dynamo's own error for code that it cannot trace."""
    from torch._dynamo import exc

    getattr(exc, "unimplemented_v2", exc.unimplemented)(gb_type=what, context=context, explanation=explanation, hints=[])


def constant_to_dynamo(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose result dynamo takes for a constant; torch._dynamo.assume_constant_result, without an import."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def source_name(source: Any) -> str:
    """A dynamo source as a Python expression over ``L`` (locals) and ``G`` (globals); a method before torch 2.10."""
    return source.name() if callable(source.name) else source.name


def errors() -> tuple[type[Exception], ...]:
    """What dynamo raises when it cannot trace a program."""
    from torch._dynamo.exc import TorchDynamoException
    from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode

    return TorchDynamoException, GuardOnDataDependentSymNode, ConstraintViolationError


def convert_frame(frame: Any, backend: Callable[..., Any], keep_guards: Callable[..., Any], constraints: Any = None) -> Any:
    """What dynamo makes of a `frame`, without running it: its ``GuardedCode``, or None where it finds no work on tensors.

    `backend` gets the graph and its example inputs, `keep_guards` every guard, and says of each whether it is kept.
    """
    from torch._dynamo.convert_frame import convert_frame_assert
    from torch._dynamo.hooks import Hooks

    done = convert_frame_assert(backend, export_constraints=constraints)(frame, None, Hooks(guard_filter_fn=keep_guards), {})
    guarded: Any = getattr(done, "guarded_code", done) or None
    if guarded is not None:
        _forget_cleanup(guarded.code)
    return guarded


def _forget_cleanup(code: Any) -> None:
    """Leave the frame's names, which are its own, alone when its bytecode goes: at exit, torch's hook finds half of them."""
    from torch._dynamo.utils import CleanupManager

    CleanupManager.instance.values.pop(id(code), None)
    CleanupManager.instance.refs.pop(id(code), None)


def named_backend(name: str) -> Callable[..., Any] | str:
    """The function behind a backend that this process registered, to be sent to another; the name of one that torch brings."""
    registry = sys.modules.get("torch._dynamo.backends.registry")
    function = registry._COMPILER_FNS.get(name) if registry else None
    is_ours = function is not None and not str(getattr(function, "__module__", "")).startswith("torch.")
    return function if is_ours else name  # type: ignore[return-value]


def backend_function(backend: str | Callable[..., Any]) -> Callable[..., Any]:
    """The function behind a backend that torch brings, that is registered here, or that was given."""
    from torch._dynamo.backends.registry import lookup_backend

    function: Callable[..., Any] = lookup_backend(backend)
    return function


def guards_hold(function: Callable[..., Any], names: Mapping[str, Any]) -> bool:
    """Whether some code that dynamo compiled for `function` serves a call with these local names; nothing is run."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    entries = _debug_get_cache_entry_list(function.__code__)
    return any(entry.guard_manager.check(dict(names)) for entry in entries)


def compile_limit() -> int:
    """Dynamo's limit of compiles for one function, where dynamo is imported; else what it is by default."""
    config = sys.modules.get("torch._dynamo.config")
    return int(config.recompile_limit) if config is not None else 8


@contextmanager
def around_compiles(on_start: Callable[[], None], on_end: Callable[[], None]) -> Iterator[None]:
    """Call back when dynamo begins a compile and when it is done, in its thread; one inside another is a part of it."""
    from torch._dynamo.callback import callback_handler

    start = callback_handler.register_start_callback(lambda of: on_start())
    end = callback_handler.register_end_callback(lambda of: on_end())
    try:
        yield
    finally:
        callback_handler.remove_start_callback(start)
        callback_handler.remove_end_callback(end)


@contextmanager
def noting_recompiles() -> Iterator[Callable[[], list[tuple[str, str, str, str]]]]:
    """Gives a function that says what was compiled again since then: compile id, function, site and reason of each."""
    from torch._dynamo import utils

    utils.clear_compilation_metrics()
    utils.set_compilation_metrics_limit(100_000)

    def recompiles() -> list[tuple[str, str, str, str]]:
        return [
            (
                str(metrics.compile_id),
                str(metrics.co_name),
                f"{metrics.co_filename}:{metrics.co_firstlineno}",
                metrics.recompile_reason,
            )
            for metrics in utils.get_compilation_metrics()
            if metrics.recompile_reason
        ]

    try:
        yield recompiles
    finally:
        utils.set_compilation_metrics_limit(utils.DEFAULT_COMPILATION_METRICS_LIMIT)


def module_code(graph: GraphModule) -> str:
    """Python text of a module class ``Repro`` that does what `graph` does."""
    from torch._dynamo.debug_utils import NNModuleToString

    return str(NNModuleToString.convert(graph))
