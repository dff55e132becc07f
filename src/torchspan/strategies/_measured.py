"""What this process has measured: how the compile of a program ended by which strategy, for the next equal program."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from torchspan.core.report import Outcome
from torchspan.jobs.budget import Budget
from torchspan.regions.settings import Settings
from torchspan.strategies._blocks import structure

MAX_KNOWN = 256
# what a larger budget or another strategy may cure; a compile that failed for another reason is tried again
_COSTLY = ("timeout", "memory", "crashed")
_known: dict[Hashable, dict[str, tuple[Measured, Budget]]] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Measured:
    """How the compile of a program by `strategy` ended, after how many seconds."""

    strategy: str
    outcome: Outcome
    seconds: float

    def __str__(self) -> str:
        return f"{self.strategy}, {self.outcome} after {self.seconds:.3g} s"


def note(program: Callable[..., Any], settings: Settings, budget: Budget, measured: Measured) -> None:
    """Remember how a compile ended, for :func:`recall`; of a strategy with several regions, the worst."""
    key = _key(program, settings)
    if key is None or measured.outcome not in ("compiled", *_COSTLY):
        return
    with _lock:
        known = _known.setdefault(key, {})
        if measured.strategy not in known or measured.outcome in _COSTLY:
            known[measured.strategy] = measured, budget
        while len(_known) > MAX_KNOWN:
            del _known[next(iter(_known))]


def recall(program: Callable[..., Any], settings: Settings, budget: Budget) -> tuple[Measured, ...]:
    """What is known of programs equal to this one: what compiled within `budget`, and what did not with at least as much."""
    key = _key(program, settings)
    with _lock:
        known = tuple(_known.get(key, {}).values()) if key is not None else ()
    return tuple(one for one, was in known if _tells(one, was, budget))


def forget() -> None:
    """Forget every measurement."""
    with _lock:
        _known.clear()


def _tells(measured: Measured, was: Budget, budget: Budget) -> bool:
    if measured.outcome == "compiled":
        return measured.seconds <= budget.seconds
    return _is_within(budget, was)


def _is_within(budget: Budget, other: Budget) -> bool:
    has_less_memory = other.limit_bytes is None or (budget.limit_bytes is not None and budget.limit_bytes <= other.limit_bytes)
    return budget.seconds <= other.seconds and has_less_memory


def _key(program: Callable[..., Any], settings: Settings) -> Hashable | None:
    """Equal for two modules of the same structure that are compiled in the same way; None for what has no structure."""
    if not isinstance(program, torch.nn.Module):
        return None
    options = tuple(sorted((name, repr(value)) for name, value in settings.options.items()))
    return structure(program), settings.backend, settings.mode, options, settings.fullgraph, settings.dynamic
