"""Has a block's calls inside a compiled program be nested regions, by torch's own ``nested_compile_region``."""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn


def is_available() -> bool:
    """Whether this torch has ``torch.compiler.nested_compile_region``."""
    return hasattr(torch.compiler, "nested_compile_region")


def nest(block: nn.Module) -> None:
    """Have `block`'s forward be a nested region where it is compiled; run eagerly, it does what it did."""
    if not is_nested(block):
        block.__dict__["forward"] = types.MethodType(_nested(type(block).forward), block)


def unnest(block: nn.Module) -> None:
    """Undo :func:`nest`."""
    if is_nested(block):
        del block.__dict__["forward"]


def is_nested(block: nn.Module) -> bool:
    """Whether :func:`nest` holds for `block`.

    >>> block = nn.Linear(2, 2)
    >>> nest(block)
    >>> is_nested(block), torch.equal(block(torch.ones(1, 2)), nn.Linear.forward(block, torch.ones(1, 2)))
    (True, True)
    >>> unnest(block)
    >>> is_nested(block)
    False
    """
    own = getattr(block.__dict__.get("forward"), "__func__", None)
    return own is not None and own is _nested(type(block).forward)


@cache
def _nested(forward: Callable[..., Any]) -> Callable[..., Any]:
    region: Callable[..., Any] = torch.compiler.nested_compile_region(forward)
    region.__name__ = "forward"  # by which a pickled block finds the forward of its class again
    return region
