"""Blocks: the repeated parts of a model, told by the names of its submodules."""

from __future__ import annotations

import re

_BLOCK = re.compile(r"((?:.*?\.)?\d+)(?:\.|$)")


def block_of(path: str) -> str | None:
    """The block that a parameter or submodule belongs to: its path up to the first number; None for what is in none.

    >>> block_of("model.layers.3.attention.wq.weight"), block_of("model.norm.weight")
    ('model.layers.3', None)
    """
    match = _BLOCK.match(path)
    return match[1] if match else None
