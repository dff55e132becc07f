"""System 4: a program compiled ahead of time, on disk: made once, loaded in a fresh process without tracing or compiling."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchspan.artifacts.artifact import Artifact as Artifact
    from torchspan.artifacts.artifact import precompile as precompile
    from torchspan.artifacts.input_text import parse_dynamic as parse_dynamic
    from torchspan.artifacts.input_text import parse_inputs as parse_inputs
    from torchspan.artifacts.inspection import describe as describe
    from torchspan.artifacts.inspection import diff as diff
    from torchspan.artifacts.inspection import verify as verify
    from torchspan.artifacts.loading import load as load
    from torchspan.artifacts.signing import read_key as read_key
    from torchspan.artifacts.two_stages import Precompile as Precompile

# Where each name comes from, imported when it is first looked up: loading an artifact must not import what compiles one.
_PUBLIC = {
    "Artifact": "artifact",
    "Precompile": "two_stages",
    "describe": "inspection",
    "diff": "inspection",
    "load": "loading",
    "parse_dynamic": "input_text",
    "parse_inputs": "input_text",
    "precompile": "artifact",
    "read_key": "signing",
    "verify": "inspection",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value
