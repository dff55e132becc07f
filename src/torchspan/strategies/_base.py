"""What a strategy is: a file of this folder with a SUMMARY and a function `cut` from a program to its Parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torchspan.core.registry import Registry

REGISTRY = Registry("torchspan.strategies", "strategy")


@dataclass(frozen=True)
class Part:
    """One region: `targets` that ONE compile serves. They are the program itself, or modules inside it (`is_block`)."""

    name: str
    targets: tuple[Callable[..., Any], ...]
    is_block: bool = False


@dataclass(frozen=True)
class Cut:
    """How a strategy cuts a program: its parts, and why they are these (or why there are none)."""

    parts: tuple[Part, ...]
    reason: str


def cut(strategy: str, program: Callable[..., Any]) -> Cut:
    """How the strategy of this name cuts `program`; raises UnknownNameError for a name that nothing answers to."""
    return REGISTRY.get(strategy).cut(program)


def program_name(program: Callable[..., Any]) -> str:
    """The class of a module, the qualified name of a function."""
    import torch

    if isinstance(program, torch.nn.Module):
        return type(program).__name__
    return getattr(program, "__qualname__", type(program).__name__)
