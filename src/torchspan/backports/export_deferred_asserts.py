"""``torch.export.export(…, prefer_deferred_runtime_asserts_over_guards=True)``: relations of sizes become assertions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from torchspan.backports._base import Backport, Change

_OPTION = "prefer_deferred_runtime_asserts_over_guards"
_OLD_OPTION = "allow_complex_guards_as_runtime_asserts"  # what the tracer called it before 2.9
_preferred: ContextVar[bool] = ContextVar(_OPTION, default=False)


def _with_the_option(export: Callable[..., Any]) -> Callable[..., Any]:
    """An exporting function that also takes the option, and hands it to the tracer below."""

    @functools.wraps(export)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = _preferred.set(kwargs.pop(_OPTION, False))
        try:
            return export(*args, **kwargs)
        finally:
            _preferred.reset(before)

    signature = inspect.signature(export)
    added = inspect.Parameter(_OPTION, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), added])  # type: ignore[attr-defined]
    return run


def _taking_it(trace: Callable[..., Any]) -> Callable[..., Any]:
    """The tracer, which is called without it."""

    @functools.wraps(trace)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not _preferred.get():
            return trace(*args, **kwargs)
        BACKPORT.record_use(f"torch.export.export({_OPTION}=True)")
        return trace(*args, **{_OLD_OPTION: True, **kwargs})

    return run


def _lacks(module: ModuleType | None) -> bool:
    return module is None or _OPTION not in inspect.signature(inspect.unwrap(module.export)).parameters


BACKPORT = Backport(
    name="export_deferred_asserts",
    summary=f"torch.export.export({_OPTION}=True), draft_export too: relations of sizes become assertions of the program",
    target="torch.export",
    since="2.9.0",
    upstream="https://github.com/pytorch/pytorch/pull/160111",
    differs="torch 2.8 defers most such relations without it too, and does not check those that only a branch needs",
    replaces={"export": _with_the_option, "draft_export": _with_the_option},
    also=(Change("torch.export._trace", "_export", _taking_it),),
    lacks=_lacks,
)
