"""``torch.compiler.precompile``: capture a function's one call ahead of time, and load it in another process."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from torchspan.backports._base import Backport, is_lacking
from torchspan.environment.patch import MissingModule, MissingName, Patch

_MODULE = "torch.compiler.precompile"
_NAMES = ("Capture", "MakeFxTracer", "PrecompileError", "PrecompileSummary", "PrecompiledRunnable", "capture", "load")


def _named(name: str) -> object:
    """One of the names, looked up as a plug-in is: artifacts stand above backports."""
    file = {"capture": "single_call", "load": "single_call_loading"}.get(name, "single_call_interface")
    return getattr(importlib.import_module(f"torchspan.artifacts.{file}"), name)


class _Submodule(Backport):
    """Names of ``torch.compiler``, one of which is a module with names of its own."""

    def patches(self) -> Iterable[Patch]:
        yield from super().patches()
        yield MissingModule(self.name, _MODULE, _module, self.reason)
        for name in _NAMES:
            yield MissingName(self.name, _MODULE, name, partial(_named, name), self.reason)


def _module() -> Mapping[str, object]:
    if not is_lacking(BACKPORT):
        raise ModuleNotFoundError(f"No module named {_MODULE!r}: torch 2.14 has a function of that name, which is left alone")
    exported = [name for name in _NAMES if name != "PrecompileError"]
    return {**{name: _named(name) for name in _NAMES}, "__all__": exported}


_names: dict[str, Callable[[], object]] = {
    "precompile": partial(importlib.import_module, _MODULE),
    "PrecompileError": partial(_named, "PrecompileError"),
}

BACKPORT = _Submodule(
    name="compiler_precompile",
    summary="capture one call of a function ahead of time and load it elsewhere: torch.compiler.precompile",
    target="torch.compiler",
    since="2.15.0",
    came={"2.14.0": ("precompile", "PrecompileError")},
    first_forms={"2.14": "a function without capture, which is left alone"},
    upstream="https://github.com/pytorch/pytorch/blob/v2.15.0/torch/compiler/precompile.py",
    differs=(
        "the files are a torchspan artifact and its digest: no Python source is executed, nothing is unpickled; every call is "
        "held to guards (also the mode of modules, values of constants, code of classes, strides), and a mismatch is a "
        "PrecompileError; random numbers are drawn as eager draws them; a CPU's dense tensors of static shape only: "
        "mark_unbacked is an UnsupportedError"
    ),
    names=_names,
)
