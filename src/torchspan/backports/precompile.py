"""``torch.Precompile``: ahead-of-time compilation in two stages, ``dynamo`` and ``aot_autograd``."""

from __future__ import annotations

import importlib

from torchspan.backports._base import Backport


def _precompile() -> object:
    """The class itself, looked up by name as a plug-in is: artifacts stand above backports."""
    return importlib.import_module("torchspan.artifacts").Precompile


BACKPORT = Backport(
    name="precompile",
    summary="capture a model as a graph with bytecode and guards, then compile it ahead of time: torch.Precompile",
    target="torch",
    since="no release so far; it is proposed",
    upstream="https://github.com/pytorch/pytorch",
    differs="nothing to differ from: torch 2.14 and later have torch.compiler.precompile, which is another interface",
    names={"Precompile": _precompile},
)
