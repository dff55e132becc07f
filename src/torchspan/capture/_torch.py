"""The private names of torch that capture needs, imported when they are called for; a new torch breaks here."""

from __future__ import annotations

import inspect
import logging
import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor

Note = Callable[[str, str, Any, Mapping[str, Any]], None]
_TRACING = threading.RLock()


def follow_backward(loss: Tensor) -> None:
    """Make nodes that the backward of `loss` traces carry the sequence number of the autograd node that ran them."""
    from torch._functorch._aot_autograd.logging_utils import setup_stacktrace_preservation_hooks

    setup_stacktrace_preservation_hooks([loss.grad_fn])  # type: ignore[list-item]


@contextmanager
def kernels_kept_whole() -> Iterator[None]:
    """While this is open, make_fx records operators as eager calls them, also those that could be decomposed.

    ``silu_backward`` has kernels of its own and also a composite implementation. Autograd calls the kernel; make_fx of old
    torch (2.8) traced the composite, whose rounding differs (1e-9): with it, a captured step is not bitwise eager's. Newer
    ones ask ``autograd_would_have_decomposed`` first, and nothing is done here.
    """
    from torch._C import DispatchKey
    from torch.fx.experimental import proxy_tensor

    if hasattr(proxy_tensor, "autograd_would_have_decomposed"):
        yield
        return
    key = DispatchKey.CompositeImplicitAutograd
    kept = [operator for operator in _with_kernel_and_composite() if key not in operator.py_kernels]
    for operator in kept:
        operator.py_kernels[key] = partial(_composite_unless_recorded, operator)
    try:
        yield
    finally:
        for operator in kept:
            del operator.py_kernels[key]


def _composite_unless_recorded(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """The composite implementation for fake tensors, which need shapes; no decomposition for what records the graph."""
    from torch._C import DispatchKey
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    if get_proxy_mode() is not None:
        return NotImplemented
    return operator._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **kwargs)


@cache
def _with_kernel_and_composite() -> tuple[Any, ...]:
    """Operators that have a CPU and a composite kernel: ``silu_backward``, ``mish_backward``, ``native_channel_shuffle``."""

    def has_all(name: str) -> bool:
        keys = ("CompositeImplicitAutograd", "CPU")
        return all(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys)

    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::") and "." not in name)
    return tuple(getattr(torch.ops.aten, name.removeprefix("aten::")).default for name in names if has_all(name))


@contextmanager
def views_of_any_size() -> Iterator[None]:
    """While this is open, a fake tensor of a size that depends on data can be viewed; old torch (2.8) cannot by itself."""
    from torch._subclasses import fake_impls

    known = fake_impls.op_implementations_dict
    views = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
    with _TRACING:
        if views[0] in known:
            yield
            return
        known.update(dict.fromkeys(views, _contiguous_view))
        try:
            yield
        finally:
            for view in views:
                del known[view]


def _contiguous_view(fake_mode: Any, _: Any, tensor: Tensor, shape: Sequence[Any]) -> Any:
    """A view of a contiguous tensor with symbols among its sizes; of any other tensor, what torch does."""
    if not any(isinstance(size, torch.SymInt) for size in (*tensor.shape, *shape)) or not _is_contiguous(tensor):
        return NotImplemented
    given = math.prod(size for size in shape if not (isinstance(size, int) and size == -1))
    sizes = [tensor.numel() // given if isinstance(size, int) and size == -1 else size for size in shape]
    with fake_mode:
        return tensor.as_strided(sizes, _contiguous_strides(sizes), tensor.storage_offset())


def _is_contiguous(tensor: Tensor) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return all(
        statically_known_true(found == expected)
        for found, expected in zip(tensor.stride(), _contiguous_strides(tensor.shape), strict=True)
    )


def _contiguous_strides(sizes: Sequence[Any]) -> list[Any]:
    return [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]


def below_functionalization(operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call an operator inside ``torch.func.functionalize`` as if that were not there: right if it neither writes nor aliases.

    Functionalization decomposes some operators that could also be called whole, such as ``silu_backward`` in torch 2.8.
    """
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
    from torch._subclasses.functional_tensor import FunctorchFunctionalizeAPI

    api = FunctorchFunctionalizeAPI(retrieve_current_functorch_interpreter())  # type: ignore[arg-type]
    plain_args, plain_kwargs = api.unwrap_tensors(args), api.unwrap_tensors(dict(kwargs))  # type: ignore[arg-type]
    with api.redispatch_to_next():
        return api.wrap_tensors(operator(*plain_args, **plain_kwargs))


# dynamo: one frame traced, without running it


def trace_frame(frame: Any, backend: Any, keep_guards: Any, note: Note) -> Any:
    """What dynamo makes of a `frame`: its ``GuardedCode`` (bytecode and guard manager), or None where it found no tensor work.

    Nothing of the frame is run. `backend` gets the graph and its example inputs, `keep_guards` every guard with its value, and
    `note` what dynamo should guard on and does not: where, a kind of guard, the value, and what that kind takes besides.
    Shapes are static unless marked; module hooks are guarded on.
    """
    from torch._dynamo import config
    from torch._dynamo.convert_frame import convert_frame_assert
    from torch._dynamo.hooks import Hooks

    ignored = "ignore_logging_functions" if hasattr(config, "ignore_logging_functions") else "ignore_logger_methods"
    settings = {
        "allow_rnn": True,
        "trace_autograd_ops": True,
        ignored: _logging_functions(),
        "assume_static_by_default": True,
        "automatic_dynamic_shapes": False,
        "specialize_float": True,
        "specialize_int": True,
        "guard_nn_modules": True,
        "skip_nnmodule_hook_guards": False,
        # not to be skipped because a dict is the same dict: requires_grad of a parameter may have changed
        "guard_nn_modules_using_dict_tags": False,
        "skip_tensor_guards_with_matching_dict_tags": False,
        "use_recursive_dict_tags_for_guards": False,
        "skip_no_tensor_aliasing_guards_on_parameters": False,
    }
    known = {name: value for name, value in settings.items() if hasattr(config, name)}
    with config.patch(known), _errors_told_once(), _reads_noted(note), _absences_guarded():
        done = convert_frame_assert(backend)(frame, None, Hooks(guard_filter_fn=keep_guards), {})
    guarded: Any = getattr(done, "guarded_code", done) or None
    if guarded is not None:
        _forget_cleanup(guarded.code)
    return guarded


@contextmanager
def _errors_told_once() -> Iterator[None]:
    """dynamo logs an error of a guard or of a fake tensor with its stack, and raises it as well: the second is enough."""
    loggers = [logging.getLogger(name) for name in ("torch._guards", "torch._subclasses.fake_tensor", "torch._dynamo.utils")]
    thread = threading.get_ident()

    def is_of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    for logger in loggers:
        logger.addFilter(is_of_others)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_of_others)


@contextmanager
def _reads_noted(note: Note) -> Iterator[None]:
    """Note what dynamo leaves unguarded: what a module, an object or a dict lacks; in 2.8, constants of classes."""
    from torch._dynamo.variables import (
        ConstDictVariable,
        PythonModuleVariable,
        UnspecializedNNModuleVariable,
        UserDefinedClassVariable,
        UserDefinedObjectVariable,
    )

    def of_module(variable: Any, _: Any, name: str) -> None:
        if not variable.is_torch and not hasattr(variable.value, name):
            note(source_name(variable.source), "HASATTR", variable.value, {"attr": name})

    def of_object(variable: Any, _: Any, name: str) -> None:
        if not name.startswith("__") and _lacks(variable.value, name):
            note(source_name(variable.source), "HASATTR", variable.value, {"attr": name})

    def of_class(variable: Any, _: Any, name: str) -> None:
        value = inspect.getattr_static(variable.value, name, None)
        if type(value) in (bool, int, float, str) and not name.startswith("__"):
            note(f"{source_name(variable.source)}.{name}", "CONSTANT_MATCH", value, {})

    def of_dict(variable: Any, _: Any, key: Any) -> None:
        if key.is_python_constant() and not any(_is_key(known, key) for known in variable.items):
            note(source_name(variable.source), "DICT_NOT_CONTAINS", {}, {"key": key.as_python_constant()})

    names = ("call_obj_hasattr", "var_getattr", "tp_getattro_impl")  # the last one since torch 2.15
    watched: list[tuple[Any, str, Any]] = [(PythonModuleVariable, name, of_module) for name in names]
    watched += [(UserDefinedClassVariable, name, of_class) for name in names[1:]]
    watched += [
        (kind, name, of_object) for kind in (UserDefinedObjectVariable, UnspecializedNNModuleVariable) for name in names[1:]
    ]
    watched += [(ConstDictVariable, "getitem_const_raise_exception_if_absent", of_dict)]
    with _TRACING:  # dynamo's classes are those of all threads
        before = [(kind, name, vars(kind)[name], told) for kind, name, told in watched if name in vars(kind)]
        for kind, name, function, told in before:
            setattr(kind, name, _telling(function, told))
        try:
            yield
        finally:
            for kind, name, function, _told in before:
                setattr(kind, name, function)


@contextmanager
def _absences_guarded() -> Iterator[None]:
    """In torch 2.8, a guard that an attribute is absent can be looked at: there a list of all guards gets each one's value."""
    from torch._dynamo.guards import GuardBuilder

    get: Any = GuardBuilder.get
    if "name" not in inspect.signature(get).parameters:
        yield
        return

    def get_if_there(builder: Any, name: str, *rest: Any) -> Any:
        try:
            return get(builder, name, *rest)
        except AttributeError:
            return None

    with _TRACING:
        GuardBuilder.get = get_if_there  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            GuardBuilder.get = get  # type: ignore[method-assign]


def _telling(function: Any, told: Any) -> Any:
    @wraps(function)
    def call(variable: Any, *args: Any, **kwargs: Any) -> Any:
        if variable.source is not None and len(args) > 1:
            told(variable, *args[:2])
        return function(variable, *args, **kwargs)

    return call


def _lacks(value: Any, name: str) -> bool:
    """Whether an object has no attribute of that name, as far as can be told without running code of its class."""
    missing = object()
    find = inspect.getattr_static(type(value), "__getattr__", None)
    if inspect.getattr_static(value, name, missing) is not missing or find not in (None, torch.nn.Module.__getattr__):
        return False
    return not hasattr(value, name)


def _is_key(known: Any, key: Any) -> bool:
    """Whether a key of a traced dict is that constant."""
    return bool(known.vt.is_python_constant() and known.vt.as_python_constant() == key.as_python_constant())


def _logging_functions() -> set[Any]:
    """What writes into a log: left out of what is captured, which computes the same without."""
    names = ("debug", "info", "warn", "error", "exception", "critical", "fatal", "log")
    places = (vars(logging.Logger), vars(logging))  # also what others add there, such as Transformers' warning_once
    found = {value for held in places for name, value in held.items() if name.startswith(names) and callable(value)}
    return {*(value for value in found if not isinstance(value, type)), warnings.warn}


@dataclass(frozen=True)
class Dynamic:
    """A dimension that is dynamic: from `minimum` to `maximum`; a wish may be fixed where the program needs it to be."""

    minimum: int | None = None
    maximum: int | None = None
    is_wish: bool = False


@contextmanager
def dynamic_dims(tensors: Sequence[Tensor], dims: Sequence[Mapping[int, Dynamic]]) -> Iterator[None]:
    """Have dynamo take these dimensions of each tensor as symbols in what it traces inside; the tensors forget it after."""
    if not any(dims):
        yield
        return
    from torch._dynamo import mark_dynamic, maybe_mark_dynamic

    before = [dict(vars(tensor)) for tensor in tensors]
    try:
        for tensor, which in zip(tensors, dims, strict=True):
            for dim, wanted in sorted(which.items()):
                if wanted.is_wish:
                    maybe_mark_dynamic(tensor, dim)
                elif wanted.minimum is None and wanted.maximum is None:
                    mark_dynamic(tensor, dim)
                else:  # torch needs both bounds or none
                    mark_dynamic(tensor, dim, min=wanted.minimum or 2, max=wanted.maximum or sys.maxsize - 1)
        yield
    finally:
        for tensor, known in zip(tensors, before, strict=True):
            vars(tensor).clear()
            vars(tensor).update(known)


def _forget_cleanup(code: Any) -> None:
    """Leave the scope of a capture, which is its own, alone when its bytecode goes: at exit, torch's hook finds half of it."""
    from torch._dynamo.utils import CleanupManager

    CleanupManager.instance.values.pop(id(code), None)
    CleanupManager.instance.refs.pop(id(code), None)


def tracing_state() -> tuple[Any, tuple[Any, ...], tuple[str, ...], tuple[tuple[str, Any], ...], tuple[str, ...]]:
    """Inside a dynamo backend: the tracing context, the code traced so far, and the Python objects that will be changed.

    Then the attributes that are set and put back in the end, with the constants that they have then and had before; last where
    those parts of the result are found that the program did not make.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._guards import TracingContext

    context = TracingContext.get()
    translator = InstructionTranslator.current_tx()
    effects = translator.output.side_effects
    changed, restored = list[str](), list[tuple[str, Any]]()
    for item in effects.id_to_variable.values():
        if not _is_changed_outside(effects, item):
            continue
        name, put_back = source_name(item.source), _put_back(effects, item)
        if put_back is None:
            changed.append(name)
        else:
            restored += [(f"{name}.{attribute}", value) for attribute, value in put_back.items()]
    if effects.tensor_hooks:
        changed.append("a hook on a tensor")
    returned: dict[str, None] = {}
    _find_sources(translator.stack[-1:], effects, returned, {})
    return context, tuple(context.traced_code), tuple(changed), tuple(restored), tuple(returned)


def _find_sources(value: Any, effects: Any, found: dict[str, None], seen: dict[int, Any]) -> None:
    """Note where the parts of a traced value are found, from the outermost inwards; on those dynamo need not have guards.

    Torch 2.13 and later put off a guard on a constant until its value is needed, and to return it that is never so.
    """
    from torch._dynamo.variables.base import VariableTracker

    if id(value) in seen:
        return
    seen[id(value)] = value
    computed = getattr(getattr(value, "_cache", None), "lazy_vars", None)  # torch 2.15: of constants, when it is called
    parts: list[Any] = []
    if isinstance(value, (list, tuple)):
        parts = list(value)
    elif isinstance(value, dict):
        parts = [*value, *value.values()]
    elif not isinstance(value, VariableTracker):
        parts = [value.vt] if hasattr(value, "vt") else []  # a key of a dict
    elif value.source is not None and not _is_new(value):
        found[source_name(value.source)] = None
    elif computed is not None:
        parts = list(computed)
    else:
        fields = [part for name, part in vars(value).items() if name not in value._nonvar_fields]
        parts = [*fields, *effects.store_attr_mutations.get(value, {}).values()]
    for part in parts:
        _find_sources(part, effects, found, seen)


def _is_new(item: Any) -> bool:
    """Whether the program makes an object itself."""
    from torch._dynamo.variables.base import AttributeMutationNew, ValueMutationNew

    return isinstance(item.mutation_type, (AttributeMutationNew, ValueMutationNew))


def _is_changed_outside(effects: Any, item: Any) -> bool:
    """Whether running the program changes a variable that it was given; not one that it made itself."""
    if item.source is None or _is_new(item):
        return False
    return bool(effects.is_modified(item))


def _put_back(effects: Any, item: Any) -> dict[str, Any] | None:
    """The constants that all attributes that were set on an object have in the end, if those are what they were before."""
    stored, value = effects.store_attr_mutations.get(item), getattr(item, "value", None)
    if not stored:
        return None
    found = {}
    for name, end in stored.items():
        if not end.is_python_constant() or not hasattr(value, name) or end.as_python_constant() is not getattr(value, name):
            return None
        found[name] = end.as_python_constant()
    return found


def source_name(source: Any) -> str:
    """A dynamo source as a Python expression over ``L`` (locals) and ``G`` (globals); a method before torch 2.10."""
    return source.name() if callable(source.name) else source.name


def dynamo_errors() -> tuple[type[Exception], ...]:
    """What dynamo raises when it cannot trace a program."""
    from torch._dynamo.exc import TorchDynamoException
    from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode

    return TorchDynamoException, GuardOnDataDependentSymNode, ConstraintViolationError


def joint_export() -> Any:
    """``aot_export_joint_with_descriptors``, or None where torch itself lacks it (a backport may stand there).

    2.9 has the function, but its counterpart takes no ``partition_fn`` and its nodes no annotations: counted as lacking.
    """
    from torch._functorch import aot_autograd

    compile_joint = vars(aot_autograd).get("aot_compile_joint_with_descriptors")
    if compile_joint is not None and compile_joint.__globals__ is not vars(aot_autograd):
        return None
    if compile_joint is None or "partition_fn" not in inspect.signature(compile_joint).parameters:
        return None
    return aot_autograd.aot_export_joint_with_descriptors


@contextmanager
def sizes_may_depend_on_data() -> Iterator[None]:
    """While this is open, a joint export takes a number that a program reads from a tensor for a symbol, not for an error."""
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True))):
        yield


def joint_gradient_placements(joint: Any) -> list[Any] | None:
    """The placements of each gradient of a joint graph in the order of its inputs, None for plain tensors; None if unknown."""
    meta = getattr(getattr(joint, "_aot_graph_capture", None), "maybe_subclass_meta", None)
    gradients = getattr(meta, "grad_input_metas", None)
    return None if gradients is None else [_placements(gradient) for gradient in gradients]


def _placements(creation: Any) -> Any:
    """The placements in how torch makes a DTensor again: a spec up to 2.12, the placements themselves since."""
    context = getattr(creation, "meta", None)
    first = context[0] if isinstance(context, tuple) and context else None
    return getattr(first, "placements", first)


def new_tracing_context() -> Any:
    """A tracing context with fake tensors of its own, as dynamo makes one for each capture; all sizes are fixed."""
    from torch._guards import TracingContext
    from torch._subclasses.fake_tensor import FakeTensorMode

    return TracingContext(FakeTensorMode())


def value_errors() -> tuple[type[Exception], ...]:
    """What a trace on fake tensors raises where a program asks for the value of one."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode
