"""torchspan: one PyTorch program, on any PyTorch, any device, any scale. Importing this changes nothing."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchspan.api import Precompile as Precompile
    from torchspan.api import activate as activate
    from torchspan.api import compile as compile
    from torchspan.api import deactivate as deactivate
    from torchspan.api import load as load
    from torchspan.api import precompile as precompile
    from torchspan.core.errors import TorchspanError as TorchspanError
    from torchspan.core.report import Report as Report
    from torchspan.strategies import Budget as Budget

__version__ = "0.1.0"

# What stands behind each public name; imported when it is first looked up, so that importing torchspan imports no torch.
_PUBLIC = {
    "Budget": "torchspan.strategies",
    "Precompile": "torchspan.api",
    "Report": "torchspan.core.report",
    "TorchspanError": "torchspan.core.errors",
    "activate": "torchspan.api",
    "compile": "torchspan.api",
    "deactivate": "torchspan.api",
    "load": "torchspan.api",
    "precompile": "torchspan.api",
}

__all__ = ["__version__", *_PUBLIC]
__all__.sort()


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        close = difflib.get_close_matches(name, _PUBLIC, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise AttributeError(f"module 'torchspan' has no attribute {name!r}{hint}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC} - {"annotations", "difflib", "importlib", "TYPE_CHECKING", "Any"})
