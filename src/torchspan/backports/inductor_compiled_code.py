"""``torch._higher_order_ops.inductor_compiled_code``: inductor's compiled code as one operator that dispatch modes see."""

from __future__ import annotations

import copy
import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule

from torchspan.backports import _options
from torchspan.backports._base import Backport, Change
from torchspan.private import dispatch, fx, inductor

_OPTION = "wrap_inductor_compiled_regions"
_GRAPH = "_torchspan_original_gm"


class InductorCompiledCallable:
    """Compiled code that takes its inputs in one list, and the graph that it was made of, if that is known.

    A traced graph cannot hold it: its number `idx` stands for it there, as long as it lives.
    """

    _boxed_call = True
    _numbers = itertools.count()
    _alive: ClassVar[weakref.WeakValueDictionary[int, InductorCompiledCallable]] = weakref.WeakValueDictionary()

    def __init__(
        self,
        compiled_callable: Callable[[Any], Any],
        original_gm: GraphModule | None = None,
        compile_region_name: str | None = None,
    ) -> None:
        self.compiled_callable = compiled_callable
        self.original_gm = original_gm
        self.compile_region_name = compile_region_name
        self.idx = next(self._numbers)
        self._alive[self.idx] = self

    def __call__(self, inputs: list[Any]) -> Any:
        """Run the compiled code; it clears `inputs`."""
        return self.compiled_callable(inputs)

    def outputs_for(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """The outputs for fake `inputs`, by the graph: compiled code cannot run on those."""
        if self.original_gm is None:
            raise RuntimeError(
                "inductor_compiled_code: the graph of this compiled code is not there, since the code came from a cache; "
                "compile it again with torch.compiler.config.force_disable_caches or a fresh TORCHINDUCTOR_CACHE_DIR"
            )
        return tuple(self.original_gm(*inputs))


def _resolve(function: InductorCompiledCallable | int) -> InductorCompiledCallable:
    if isinstance(function, InductorCompiledCallable):
        return function
    code = InductorCompiledCallable._alive.get(function)
    if code is None:
        raise RuntimeError(f"inductor_compiled_code: the compiled code with number {function} is no longer there; trace again")
    return code


@functools.cache
def _operator() -> Any:
    """The operator; torch keeps it by its name once it is there, also after the backport is taken back."""

    class InductorCompiledCode(torch._ops.HigherOrderOperator):
        def __init__(self) -> None:
            super().__init__("inductor_compiled_code")

        def __call__(self, func: Any, inputs: Any, *, name: str | None = None) -> Any:
            return super().__call__(func, inputs, name=name)

    operator = InductorCompiledCode()
    key = torch._C.DispatchKey
    for autograd in (key.AutogradCPU, key.AutogradCUDA, key.AutogradXPU, key.AutogradMPS, key.AutogradPrivateUse1):
        operator.fallthrough(autograd)
    operator.py_impl(key.CompositeExplicitAutograd)(lambda func, inputs, *, name=None: _resolve(func)(inputs))
    operator.py_functionalize_impl(_functionalized)
    fake_outputs = lambda func, inputs, *, name=None: _resolve(func).outputs_for(inputs)  # noqa: E731
    fx.register_in_modes(operator, fake_outputs, lambda func: _resolve(func).idx)
    return operator


def _functionalized(ctx: Any, func: Any, inputs: Any, *, name: str | None = None) -> Any:
    unwrapped = ctx.unwrap_tensors(inputs)
    with ctx.redispatch_to_next():
        return ctx.wrap_tensors(_operator()(func, unwrapped, name=name))


def _keeping_the_graph(init: Callable[..., None]) -> Callable[..., None]:
    """Compiled code's constructor; with the option, its graph is kept (without metadata: that holds the trace alive)."""

    @functools.wraps(init)
    def construct(self: Any, current_callable: Any, graph: Any, gm: GraphModule, *args: Any, **kwargs: Any) -> None:
        init(self, current_callable, graph, gm, *args, **kwargs)
        if getattr(inductor.config, _OPTION):
            kept = copy.deepcopy(gm)
            for node in kept.graph.nodes:
                node.meta.clear()
            vars(self)[_GRAPH] = kept

    return construct


def _leaving_the_graph(prepare: Callable[[Any], None]) -> Callable[[Any], None]:
    """What makes compiled code fit for a cache on disk: the graph stays out of it."""

    @functools.wraps(prepare)
    def prepare_for_serialization(self: Any) -> None:
        prepare(self)
        vars(self).pop(_GRAPH, None)

    return prepare_for_serialization


def _wrapping(post_compile: Callable[..., None]) -> Callable[..., None]:
    """The last step of a compile and of a load from a cache; with the option, calls go through the operator."""

    @functools.wraps(post_compile)
    def finish(self: Any, *args: Any, **kwargs: Any) -> None:
        post_compile(self, *args, **kwargs)
        if getattr(inductor.config, _OPTION) and self.current_callable is not None:
            BACKPORT.record_use(f"torch._inductor.config.{_OPTION}")
            self.current_callable = _through_the_operator(self.current_callable, vars(self).get(_GRAPH))

    return finish


def _through_the_operator(compiled: Callable[[Any], Any], graph: GraphModule | None) -> Callable[[Any], Any]:
    operator, code = _operator(), InductorCompiledCallable(compiled, graph)

    def call(inputs: list[Any]) -> Any:
        mode = torch.utils._python_dispatch._get_current_dispatch_mode()
        # a mode that the operator has no rule for would be an error
        return operator(code, inputs) if type(mode) in operator.python_key_table else compiled(inputs)

    return call


def _also_under_checkpointing(convert: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo's handling of a frame, which old torch leaves uncompiled in a dispatch mode, selective checkpointing's too."""

    @functools.wraps(convert)
    def convert_frame(self: Any, frame: Any, cache_entry: Any, frame_state: Any) -> Any:
        if not (_asks_for_option(self) and dispatch.is_only_checkpointing()):
            return convert(self, frame, cache_entry, frame_state)
        with dispatch.as_if_without_modes():
            return convert(self, frame, cache_entry, frame_state)

    return convert_frame


def _asks_for_option(callback: Any) -> bool:
    """Whether what dynamo calls for a frame leads to an inductor with the option set."""
    while inner := getattr(callback, "_torchdynamo_orig_callable", getattr(callback, "_torchdynamo_orig_backend", None)):
        callback = inner
    options = getattr(callback, "config", None)
    return bool(options.get(_OPTION) if isinstance(options, dict) else None) or bool(getattr(inductor.config, _OPTION))


BACKPORT = Backport(
    name="inductor_compiled_code",
    summary="inductor's compiled code as one operator for selective checkpointing: the option wrap_inductor_compiled_regions",
    target="torch._higher_order_ops",
    since="2.10.0",
    upstream="https://github.com/pytorch/pytorch/pull/163893",
    differs=(
        "dispatch modes that have no rule for the operator do not see it, where upstream fails; a graph that came from a cache "
        "cannot be traced again"
    ),
    names={"inductor_compiled_code": _operator},
    also=(
        Change("torch._inductor.config", "_config", _options.with_options({_OPTION: False})),
        Change("torch._inductor.config", "_compile_ignored_keys", lambda keys: {*keys, _OPTION}),
        Change("torch._inductor.output_code", "CompiledFxGraph.__init__", _keeping_the_graph),
        Change("torch._inductor.output_code", "CompiledFxGraph.prepare_for_serialization", _leaving_the_graph),
        Change("torch._inductor.output_code", "CompiledFxGraph.post_compile", _wrapping),
        Change("torch._dynamo.convert_frame", "CatchErrorsWrapper.__call__", _also_under_checkpointing),
    ),
)
