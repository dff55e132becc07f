"""The older calls to compile ahead of time, where torch has them, say once for each line what to write; they work as before."""

from __future__ import annotations

import functools
import importlib.util
import sys
import warnings
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any

from torchspan.backports._base import Backport, Change
from torchspan.core.report import current_report, user_site

_PLACE = "torch._dynamo.aot_compile"
_PAGE = "docs/precompile_migration.md"
_REASON = "its file is pickled: whoever can write the file runs code where it is loaded"

_SAVE = "torchspan.precompile(model, args).save(path)"
_INSTEAD = {
    "aot_compile": _SAVE,
    "save_compiled_function": _SAVE,
    "load_compiled_function": "torchspan.load(path, model)",
}


def _saying(name: str) -> Callable[[Any], Any]:
    """What makes of torch's own function one that says what to write instead of `name`, and is the same otherwise."""
    sites: set[str | None] = set()

    def wrap(function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            _say(name, sites)
            return function(*args, **kwargs)

        return call

    return wrap


def _say(name: str, sites: set[str | None]) -> None:
    site = user_site()
    report = current_report()
    if report is not None:
        report.decide("deprecated", name, f"torch's own, as before; write {_INSTEAD[name]}", _REASON, site)
    if site in sites:
        return
    sites.add(site)
    message = f"{name} is the older way to compile ahead of time; write {_INSTEAD[name]} ({_PAGE} says what differs)"
    file, _, line = (site or "?:0").rpartition(":")
    # the module's name is what Python's filters go by: what the main program does is shown, unless they say otherwise
    warnings.warn_explicit(message, DeprecationWarning, file, int(line), module=_module_at(site))


def _module_at(site: str | None) -> str | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if f"{frame.f_code.co_filename}:{frame.f_lineno}" == site:
            return str(frame.f_globals.get("__name__"))
        frame = frame.f_back
    return None


def _lacks(_: ModuleType | None) -> bool:
    return True  # no torch says it


def _cause() -> str | None:
    """Why nothing can be said here: this torch never had the older way."""
    return None if importlib.util.find_spec(_PLACE) else "this torch has no aot_compile, which came with 2.9"


BACKPORT = Backport(
    name="aot_compile_moved",
    summary="aot_compile, save_compiled_function and load_compiled_function say once for each line what to write instead",
    target="torch.compiler",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/aot_compile.py",
    differs="no torch has this; the calls do what torch's own do",
    replaces={"load_compiled_function": _saying("load_compiled_function")},
    also=(
        Change(_PLACE, "aot_compile_fullgraph", _saying("aot_compile")),
        Change(_PLACE, "aot_compile_module", _saying("aot_compile")),
        Change(_PLACE, "AOTCompiledFunction.save_compiled_function", _saying("save_compiled_function")),
    ),
    lacks=_lacks,
    impossible=_cause,
)
