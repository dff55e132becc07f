"""System 4: a program compiled ahead of time, on disk: made once, loaded in a fresh process without tracing or compiling."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchspan.artifacts._inputs import parse_dynamic as parse_dynamic
    from torchspan.artifacts._inputs import parse_inputs as parse_inputs
    from torchspan.artifacts._inspect import describe as describe
    from torchspan.artifacts._inspect import diff as diff
    from torchspan.artifacts._inspect import verify as verify
    from torchspan.artifacts._load import load as load
    from torchspan.artifacts._make import Artifact as Artifact
    from torchspan.artifacts._make import Precompile as Precompile
    from torchspan.artifacts._make import precompile as precompile
    from torchspan.artifacts._sign import read_key as read_key

# Where each name comes from, imported when it is first looked up: loading an artifact must not import what compiles one.
_PUBLIC = {
    "Artifact": "_make",
    "Precompile": "_make",
    "describe": "_inspect",
    "diff": "_inspect",
    "load": "_load",
    "parse_dynamic": "_inputs",
    "parse_inputs": "_inputs",
    "precompile": "_make",
    "read_key": "_sign",
    "verify": "_inspect",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value
