"""Compiled: a callable with its Report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torchspan.core.report import Report


@dataclass(frozen=True)
class Compiled:
    """A callable and the Report of how it came about.

    >>> Compiled(abs, Report())(-3)
    3
    """

    function: Callable[..., Any]
    report: Report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)
