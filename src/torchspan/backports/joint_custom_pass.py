"""``torch._functorch.config.joint_custom_pass``: a pass over the joint graph, before it is cut into forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torchspan.backports import _options
from torchspan.backports._base import Backport, Change
from torchspan.private import aot

_PLACE = "torch._functorch.config"
_NAME = "joint_custom_pass"
_AOT = "torch._functorch._aot_autograd"
_LEFT_OUT = "_save_config_ignore"  # AOTAutograd's option that names what is not saved: a function cannot be


def _then_the_pass(run_passes: Callable[..., Any]) -> Callable[..., Any]:
    """AOTAutograd's last step on the joint graph before it partitions it; the program's own pass comes after."""

    @functools.wraps(run_passes)
    def run(graph: Any, joint_inputs: Any, *args: Any, **kwargs: Any) -> Any:
        graph = run_passes(graph, joint_inputs, *args, **kwargs)
        custom_pass = getattr(aot.config, _NAME)
        if not callable(custom_pass):
            return graph
        BACKPORT.record_use(f"{_PLACE}.{_NAME}")
        return custom_pass(graph, joint_inputs)

    return run


def _not_with_the_pass(check_cacheable: Callable[[Any], None]) -> Callable[[Any], None]:
    """AOTAutograd's check whether its cache may serve a program; the cache knows no pass, so with one it may not."""

    @functools.wraps(check_cacheable)
    def check(graph: Any) -> None:
        if callable(getattr(aot.config, _NAME)):
            raise aot.BypassAOTAutogradCache(f"{_PLACE}.{_NAME} is set")
        check_cacheable(graph)

    return check


def _with_its_name(trace_structured: Callable[..., None]) -> Callable[..., None]:
    """What writes AOTAutograd's options to TORCH_TRACE as JSON, which a function is not: the pass is written by its name."""

    @functools.wraps(trace_structured)
    def trace(name: str, *args: Any, payload_fn: Callable[[], Any] = lambda: None, **kwargs: Any) -> None:
        def payload() -> Any:
            written = payload_fn()
            is_options = isinstance(written, dict) and callable(written.get(_NAME))
            return {**written, _NAME: repr(written[_NAME])} if is_options else written

        trace_structured(name, *args, payload_fn=payload, **kwargs)

    return trace


def _lacks(module: ModuleType | None) -> bool:
    return module is None or not _options.has_native_option(module, _NAME)


BACKPORT = Backport(
    name="joint_custom_pass",
    summary="a pass over the joint graph before it is partitioned: torch._functorch.config.joint_custom_pass",
    target=_PLACE,
    since="2.10.0",
    upstream="https://github.com/pytorch/pytorch/pull/164445",
    differs="a program that is compiled with a pass is not kept in AOTAutograd's cache, nor taken from it",
    replaces={
        "_config": _options.with_options({_NAME: None}, left_out_by=_LEFT_OUT),
        "_compile_ignored_keys": lambda keys: {*keys, _NAME},
    },
    also=(
        Change(f"{_AOT}.jit_compile_runtime_wrappers", "run_joint_graph_passes_on_hops", _then_the_pass),  # 2.8
        Change(f"{_AOT}.jit_compile_runtime_wrappers", "trace_structured", _with_its_name),
        Change(f"{_AOT}.graph_compile", "run_joint_graph_passes_on_hops", _then_the_pass),  # 2.9
        Change(f"{_AOT}.graph_compile", "trace_structured", _with_its_name),
        Change(f"{_AOT}.autograd_cache", "check_cacheable", _not_with_the_pass),
    ),
    lacks=_lacks,
)
