"""Graph → Graph; one pass per file, valid in, valid out.

What a pass outside this package is written with is found here: `Pass`, `PassContext`, `Stage`, `editable`, `refuse_writes`,
`Pipeline`. They are imported when they are asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchspan.passes._base import Pass, PassContext, Stage, editable, refuse_writes
    from torchspan.passes._pipeline import Pipeline

_PLACES = {
    "Pass": "_base",
    "PassContext": "_base",
    "Pipeline": "_pipeline",
    "Stage": "_base",
    "editable": "_base",
    "refuse_writes": "_base",
}
__all__ = ["Pass", "PassContext", "Pipeline", "Stage", "describe_passes", "editable", "refuse_writes"]


def describe_passes() -> list[dict[str, Any]]:
    """Every pass: ``name``, ``summary``, ``stage``, ``claim``, ``conflicts``, ``after``, ``options`` with defaults."""
    from torchspan.passes import _pipeline  # imports torch.fx: only on use

    return _pipeline.describe_passes()


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
