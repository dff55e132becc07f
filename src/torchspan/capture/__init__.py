"""Program → Graph, and Program → graph, bytecode and guards.

What an author of passes needs is found here: `capture_train_step`, `capture_joint`, and `BoundGraph`, which runs a Graph with
the parameters of a program. They are imported when they are asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchspan.capture._state import BoundGraph
    from torchspan.capture.joint import capture_joint
    from torchspan.capture.train_step import capture_train_step

_PLACES = {"BoundGraph": "_state", "capture_joint": "joint", "capture_train_step": "train_step"}
__all__ = ["BoundGraph", "capture_joint", "capture_train_step"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
