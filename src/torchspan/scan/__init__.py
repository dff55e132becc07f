"""Which torch a code base needs, read from its files: nothing is imported, nothing is run.

What a running program misses of torch is told from the same database, by the same judge.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from torchspan.scan._hooks import advice_patches, show_advice
from torchspan.scan._settings import setting_patches

if TYPE_CHECKING:
    from torchspan.scan._scan import Finding, Scan, scan

__all__ = ["Finding", "Scan", "advice_patches", "scan", "setting_patches", "show_advice"]


def __getattr__(name: str) -> object:
    """What reads files is imported when it is asked for: activation needs none of it."""
    if name in __all__:
        return getattr(importlib.import_module("torchspan.scan._scan"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
