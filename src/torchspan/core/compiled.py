"""Compiled: a callable with its Report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchspan.core.report import Report


class Compiled:
    """A callable and the Report of how it came about.

    >>> Compiled(abs, Report())(-3)
    3
    """

    def __init__(self, function: Callable[..., Any], report: Report) -> None:
        self.function = function
        self.report = report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)
