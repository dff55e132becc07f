"""Ladder: strategies in order of preference; the last is eager. The default goes by the number of parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

BILLION = 1_000_000_000


@dataclass(frozen=True)
class Ladder:
    """Names of strategies, tried in order, and why they are these."""

    strategies: tuple[str, ...]
    reason: str


def ladder_for(strategy: str, program: Callable[..., Any], *, has_budget: bool) -> Ladder:
    """The ladder that a named strategy, or ``auto``, stands for.

    ``auto`` goes by size: under 10 billion parameters the whole program, then its blocks; from 10 to 40 its blocks only; above
    that nothing is compiled unless a budget was given.

    >>> ladder_for("auto", torch.nn.Linear(2, 2), has_budget=False).strategies
    ('whole', 'per_block', 'eager')
    >>> ladder_for("per_block", torch.nn.Linear(2, 2), has_budget=False).strategies
    ('per_block', 'eager')
    """
    if strategy == "eager":
        return Ladder(("eager",), "asked for")
    if strategy != "auto":
        return Ladder((strategy, "eager"), "asked for")
    if not isinstance(program, torch.nn.Module):
        return Ladder(("whole", "eager"), "a function")
    return by_size(sum(parameter.numel() for parameter in program.parameters()), has_budget=has_budget)


def by_size(num_parameters: int, *, has_budget: bool) -> Ladder:
    """The default policy.

    >>> by_size(50_000_000_000, has_budget=False).strategies, by_size(20_000_000_000, has_budget=False).strategies
    (('eager',), ('per_block', 'eager'))
    """
    size = f"{num_parameters / BILLION:.3g} billion parameters"
    if num_parameters < 10 * BILLION:
        return Ladder(("whole", "per_block", "eager"), f"{size}: below 10 billion the whole program is tried first")
    if num_parameters <= 40 * BILLION:
        return Ladder(("per_block", "eager"), f"{size}: from 10 to 40 billion only repeated blocks are compiled")
    if has_budget:
        return Ladder(("per_block", "eager"), f"{size}: above 40 billion repeated blocks, because a budget was given")
    return Ladder(("eager",), f"{size}: above 40 billion nothing is compiled unless a budget is given")
