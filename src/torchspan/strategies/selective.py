"""One eager step is profiled, and only the parts whose share of it promises to pay are compiled; the rest runs eagerly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from torchspan.regions.part import Part
from torchspan.strategies._base import Cut, Request
from torchspan.strategies._step import Cost, StepProfile

SUMMARY = "profile one eager step, compile the parts whose share of its time promises to pay"
NEEDS_PROFILE = True
MIN_SHARE = 0.05  # of a step's time that fusing could save at most: below that, nobody sees it
MIN_CALL_S = 50e-6  # of one call: about what it costs to find the compiled code for its arguments


def cut(program: Callable[..., Any], request: Request) -> Cut:
    """One part for each kind of modules whose operations, where they can be fused, take enough of `request`'s profile."""
    if not isinstance(program, nn.Module):
        return Cut((), "a function has no modules to profile")
    if request.profile is None:
        return Cut((), "no step was profiled")
    return decide(request.profile)


def decide(profile: StepProfile) -> Cut:
    """The parts that promise to pay, and the figures by which they do, or do not.

    >>> layers, head = (nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2)
    >>> costs = (Cost("Linear ×2", layers, 2, 8e-3, 6e-3), Cost("head", (head,), 1, 2e-3, 1e-4))
    >>> result = decide(StepProfile(10e-3, costs))
    >>> [part.name for part in result.parts], result.reason
    (['Linear ×2'], 'of 10 ms in operations (forward): Linear ×2 80 %, 60 % fusible; head 20 %, 1 % fusible: left eager')
    """
    paying = [cost for cost in profile.costs if pays(cost, profile)]
    figures = "; ".join(_figures(cost, profile) for cost in sorted(profile.costs, key=lambda cost: -cost.seconds) if cost.calls)
    parts = tuple(Part(cost.name, cost.modules, is_block=True) for cost in paying)
    return Cut(parts, f"of {profile.seconds * 1e3:.3g} ms in operations (forward): {figures or 'no module was called'}")


def pays(cost: Cost, profile: StepProfile) -> bool:
    """Whether compiling promises more than it costs at every call."""
    return cost.calls > 0 and cost.fusible_s >= MIN_SHARE * profile.seconds and cost.fusible_s >= MIN_CALL_S * cost.calls


def _figures(cost: Cost, profile: StepProfile) -> str:
    whole = profile.seconds or 1.0
    end = "" if pays(cost, profile) else ": left eager"
    return f"{cost.name} {cost.seconds / whole:.0%}, {cost.fusible_s / whole:.0%} fusible{end}".replace("%", " %")
