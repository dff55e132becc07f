"""Ladder: strategies in order of preference; the last is eager. The default goes by size, unless something was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchspan.strategies._marks import has_marks
from torchspan.strategies._measured import Measured

BILLION = 1_000_000_000


@dataclass(frozen=True)
class Ladder:
    """Names of strategies, tried in order, and why they are these."""

    strategies: tuple[str, ...]
    reason: str


def ladder_for(
    strategy: str | Sequence[str], program: Callable[..., Any], *, has_budget: bool, measured: Sequence[Measured] = ()
) -> Ladder:
    """The ladder for one named strategy, for several in this order, or for ``auto``.

    ``auto`` goes by the regions that are marked, or else by size: under 10 billion parameters the whole program, then its
    blocks; from 10 to 40 its blocks only; above that nothing is compiled unless a budget was given. What was `measured` of
    equal programs overrules it.

    >>> ladder_for("auto", torch.nn.Linear(2, 2), has_budget=False).strategies
    ('whole', 'per_block', 'eager')
    >>> ladder_for("per_block", torch.nn.Linear(2, 2), has_budget=False).strategies
    ('per_block', 'eager')
    >>> ladder_for(["per_block", "whole"], torch.nn.Linear(2, 2), has_budget=False).strategies
    ('per_block', 'whole', 'eager')
    """
    if strategy == "auto":
        return overruled(_by_program(program, has_budget=has_budget), measured)
    strategies = (strategy,) if isinstance(strategy, str) else tuple(strategy)
    return Ladder((*(name for name in dict.fromkeys(strategies) if name != "eager"), "eager"), "asked for")


def _by_program(program: Callable[..., Any], *, has_budget: bool) -> Ladder:
    if not isinstance(program, torch.nn.Module):
        return Ladder(("whole", "eager"), "a function")
    if has_marks(program):
        return Ladder(("regional", "eager"), "modules of it are marked as regions")
    return by_size(sum(parameter.numel() for parameter in program.parameters()), has_budget=has_budget)


def by_size(num_parameters: int, *, has_budget: bool) -> Ladder:
    """The default policy; every tier but eager is within a budget, the default one if none is given.

    >>> by_size(50_000_000_000, has_budget=False).strategies, by_size(20_000_000_000, has_budget=False).strategies
    (('eager',), ('per_block', 'eager'))
    """
    size = f"{num_parameters / BILLION:.3g} billion parameters"
    if num_parameters < BILLION:
        return Ladder(("whole", "per_block", "eager"), f"{size}: below 1 billion the whole program is tried first")
    if num_parameters < 10 * BILLION:
        reason = f"{size}: from 1 to 10 billion the whole program gets a part of the budget, its blocks what is left"
        return Ladder(("whole", "per_block", "eager"), reason)
    if num_parameters <= 40 * BILLION:
        return Ladder(("per_block", "eager"), f"{size}: from 10 to 40 billion only repeated blocks are compiled")
    if has_budget:
        return Ladder(("per_block", "eager"), f"{size}: above 40 billion repeated blocks, because a budget was given")
    return Ladder(("eager",), f"{size}: above 40 billion nothing is compiled unless a budget is given")


def overruled(policy: Ladder, measured: Sequence[Measured]) -> Ladder:
    """`policy` without strategies that are known to fail; first comes one that has compiled, though `policy` lacks it.

    >>> ladder = overruled(Ladder(("whole", "per_block", "eager"), "small"), (Measured("whole", "timeout", 180.0),))
    >>> ladder.strategies, ladder.reason
    (('per_block', 'eager'), 'measured on an equal program: whole, timeout after 180 s; by default: small')
    >>> overruled(Ladder(("eager",), "large"), (Measured("per_block", "compiled", 9.0),)).strategies
    ('per_block', 'eager')
    """
    failed = {ending.strategy for ending in measured if ending.outcome != "compiled"}
    worked = {ending.strategy for ending in measured if ending.outcome == "compiled"}
    default = [name for name in policy.strategies if name not in failed]
    first = [name for name in ("whole", "per_block") if name in worked and name not in policy.strategies][:1]
    strategies = tuple(dict.fromkeys([*first, *default]))
    if strategies == policy.strategies:
        return policy
    evidence = ", ".join(str(ending) for ending in measured if ending.strategy in failed or ending.strategy in first)
    return Ladder(strategies, f"measured on an equal program: {evidence}; by default: {policy.reason}")
