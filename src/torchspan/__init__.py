"""torchspan: one PyTorch program, on any PyTorch, any device, any scale. Importing this changes nothing."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchspan.api import activate as activate
    from torchspan.api import deactivate as deactivate
    from torchspan.api import register_backport as register_backport
    from torchspan.api import register_shim as register_shim
    from torchspan.artifacts import Precompile as Precompile
    from torchspan.artifacts.artifact import precompile as precompile
    from torchspan.artifacts.loading import load as load
    from torchspan.backports._base import Backport as Backport
    from torchspan.core.errors import TorchspanError as TorchspanError
    from torchspan.core.report import Report as Report
    from torchspan.devices._value import TorchDevice as TorchDevice
    from torchspan.devices._value import keep_cpu as keep_cpu
    from torchspan.diagnosis.profiling import CompileProfile as CompileProfile
    from torchspan.diagnosis.profiling import profile_compile as profile_compile
    from torchspan.jobs.budget import Budget as Budget
    from torchspan.strategies import compile_bounded as compile  # noqa: F401
    from torchspan.strategies import partial_compile as partial_compile
    from torchspan.strategies import region as region
    from torchspan.strategies import safe_compile as safe_compile
    from torchspan.strategies import smart_compile as smart_compile

__version__ = "0.1.0"

# Where each public name comes from; imported when it is first looked up, so that importing torchspan imports no torch.
_PUBLIC = {
    "Backport": "torchspan.backports._base:Backport",
    "Budget": "torchspan.jobs.budget:Budget",
    "CompileProfile": "torchspan.diagnosis.profiling:CompileProfile",
    "Precompile": "torchspan.artifacts:Precompile",
    "Report": "torchspan.core.report:Report",
    "TorchDevice": "torchspan.devices._value:TorchDevice",
    "TorchspanError": "torchspan.core.errors:TorchspanError",
    "activate": "torchspan.api:activate",
    "compile": "torchspan.strategies:compile_bounded",
    "deactivate": "torchspan.api:deactivate",
    "keep_cpu": "torchspan.devices._value:keep_cpu",
    "load": "torchspan.artifacts:load",
    "partial_compile": "torchspan.strategies:partial_compile",
    "precompile": "torchspan.artifacts:precompile",
    "profile_compile": "torchspan.diagnosis.profiling:profile_compile",
    "region": "torchspan.strategies:region",
    "register_backport": "torchspan.api:register_backport",
    "register_shim": "torchspan.api:register_shim",
    "safe_compile": "torchspan.strategies:safe_compile",
    "smart_compile": "torchspan.strategies:smart_compile",
}

__all__ = ["__version__", *_PUBLIC]
__all__.sort()


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        close = difflib.get_close_matches(name, _PUBLIC, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise AttributeError(f"module 'torchspan' has no attribute {name!r}{hint}")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC} - {"annotations", "difflib", "importlib", "TYPE_CHECKING", "Any"})
