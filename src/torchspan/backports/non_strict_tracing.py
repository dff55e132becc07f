"""``torch.compiler._is_non_strict_tracing`` and the contexts in which a training step is traced by ``make_fx``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from torchspan.backports._base import Backport, Change
from torchspan.private import aot

_depth: list[bool] = []


def _is_non_strict_tracing() -> bool:
    """Whether this is inside of ``_non_strict_tracing_context``."""
    return bool(_depth)


@contextmanager
def _non_strict_tracing_context() -> Iterator[None]:
    """Inside, programs that ask are told that they are traced by ``make_fx`` without dynamo."""
    _depth.append(True)
    try:
        yield
    finally:
        _depth.pop()


@contextmanager
def _patch_engine_backward() -> Iterator[None]:
    """Inside, a backward that is traced notes for its nodes which forward they belong to."""
    import torch.autograd.graph as graph

    run: Any = graph._engine_run_backward

    @functools.wraps(run)
    def run_backward(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_non_strict_tracing():
            raise AssertionError("_patch_engine_backward() must be used under _non_strict_tracing_context()")
        aot.keep_forward_traces(outputs)
        return run(outputs, *args, **kwargs)

    before = {module: vars(module)["_engine_run_backward"] for module in (graph, torch.autograd)}
    for module in before:
        vars(module)["_engine_run_backward"] = run_backward
    try:
        yield
    finally:
        for module, function in before.items():
            vars(module)["_engine_run_backward"] = function


def _recording(make_fx: Callable[..., Any]) -> Callable[..., Any]:
    """make_fx, whose `record_stack_traces` this torch calls `stack_trace`."""

    @functools.wraps(make_fx)
    def make(*args: Any, record_stack_traces: bool = False, **options: Any) -> Any:
        if record_stack_traces:
            BACKPORT.record_use("make_fx(record_stack_traces=True)")
            options["stack_trace"] = True
        return make_fx(*args, **options)

    return make


def _recording_if_lacking(make_fx: Callable[..., Any]) -> Callable[..., Any]:
    import inspect

    parameters = inspect.signature(make_fx).parameters
    return _recording(make_fx) if "stack_trace" in parameters and "record_stack_traces" not in parameters else make_fx


BACKPORT = Backport(
    name="non_strict_tracing",
    summary="a training step traced by make_fx: torch.compiler._is_non_strict_tracing, make_fx(record_stack_traces=…)",
    target="torch.compiler",
    since="2.12.0",
    came={"2.13.0": ("_patch_engine_backward",)},
    first_forms={"2.12": "asks for a context around a patch of the backward"},
    upstream="https://github.com/pytorch/pytorch/blob/v2.12.0/torch/compiler/__init__.py",
    names={
        "_is_non_strict_tracing": lambda: _is_non_strict_tracing,
        "_non_strict_tracing_context": lambda: _non_strict_tracing_context,
        "_patch_engine_backward": lambda: _patch_engine_backward,
    },
    also=(Change("torch.fx.experimental.proxy_tensor", "make_fx", _recording_if_lacking),),
    lacks=lambda module: (
        module is None or vars(module).get("_is_non_strict_tracing", _is_non_strict_tracing) is _is_non_strict_tracing
    ),
)
