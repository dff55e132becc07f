"""Nothing is compiled: the last rung of every ladder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchspan.strategies._base import Cut, Request

SUMMARY = "no region: everything runs eagerly"


def cut(program: Callable[..., Any], request: Request) -> Cut:
    """No parts."""
    return Cut((), "nothing is compiled")
