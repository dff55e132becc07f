"""Blocks: the repeated parts of a model, told by the names of its submodules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

_BLOCK = re.compile(r"((?:.*?\.)?\d+)(?:\.|$)")


def block_of(path: str) -> str | None:
    """The block that a parameter or submodule belongs to: its path up to the first number; None for what is in none.

    >>> block_of("model.layers.3.attention.wq.weight"), block_of("model.norm.weight")
    ('model.layers.3', None)
    """
    match = _BLOCK.match(path)
    return match[1] if match else None


def part_of(path: str, patterns: Sequence[str]) -> str | None:
    """The outermost part of `path` that answers to one of `patterns`, as of file names; None if none does.

    >>> part_of("model.layers.3.feed_forward.w1", ["*.feed_forward"])
    'model.layers.3.feed_forward'
    """
    names = path.split(".")
    paths = [".".join(names[:end]) for end in range(1, len(names) + 1)]
    return next((prefix for prefix in paths if any(fnmatchcase(prefix, pattern) for pattern in patterns)), None)


def patterns_of(text: str) -> list[str]:
    """The patterns that an option lists, with ``|`` between them.

    >>> patterns_of("mm | *.feed_forward|")
    ['mm', '*.feed_forward']
    """
    return [pattern.strip() for pattern in text.split("|") if pattern.strip()]
