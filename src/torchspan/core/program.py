"""Program: a module or function, example inputs, and the state that comes with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from torchspan.core.errors import InputError


@dataclass(frozen=True)
class Program:
    """What is captured or compiled: `target` (a module or function) with example `args` and `kwargs`.

    >>> Program(torch.nn.Linear(2, 3), (torch.ones(1, 2),)).name
    'Linear'
    """

    target: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.target):
            raise InputError(f"a program is a module or a function, not {type(self.target).__name__}")
        if not isinstance(self.args, tuple):
            raise InputError(f"example inputs are a tuple, not {type(self.args).__name__}; write (x,) for one input")
        if not isinstance(self.kwargs, Mapping):
            raise InputError(f"example keyword inputs are a mapping by name, not {type(self.kwargs).__name__}")

    @property
    def name(self) -> str:
        """The class of a module, the qualified name of a function."""
        return program_name(self.target)

    def state(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers by name; empty for a function."""
        if not isinstance(self.target, torch.nn.Module):
            return {}
        return {**dict(self.target.named_parameters()), **dict(self.target.named_buffers())}


def program_name(program: Callable[..., Any]) -> str:
    """The class of a module, the qualified name of a function.

    >>> program_name(torch.nn.Linear(1, 1)), program_name(len)
    ('Linear', 'len')
    """
    if isinstance(program, torch.nn.Module):
        return type(program).__name__
    return getattr(program, "__qualname__", type(program).__name__)
