"""A Part: what ONE compile serves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Part:
    """One region: `targets` that ONE compile serves. They are the program itself, or modules inside it (`is_block`).

    `nested` are the classes of its modules that torch is to compile as regions inside this one.
    """

    name: str
    targets: tuple[Callable[..., Any], ...]
    is_block: bool = False
    nested: tuple[type[nn.Module], ...] = ()

    @cached_property
    def is_called_inside(self) -> bool:
        """Whether its targets are run by their ``_call_impl`` (hooks and forward) and not by their ``__call__``."""
        return self.is_block or all(type(target).__call__ is nn.Module.__call__ for target in self.targets)
