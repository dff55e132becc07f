"""What this process has measured: how the compile of a program ended by which strategy, for the next equal program."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from torchspan.core.report import Outcome
from torchspan.jobs.budget import Budget
from torchspan.jobs.supervisor import Ending
from torchspan.regions.part import Part
from torchspan.regions.settings import Settings
from torchspan.strategies._blocks import structure

MAX_KNOWN = 256
# what a larger budget or another strategy may cure; a compile that failed for another reason is tried again
_COSTLY = ("timeout", "memory", "crashed")
SECONDS_A_MODULE = 0.1  # of a Llama's, by inductor: 3.5 s for two blocks of about fifteen modules, 44 s for thirty-two
FIRST_SECONDS = 10.0  # of the least that inductor compiles: its C++ compiler
_seconds: dict[Hashable, float] = {}
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


def note(
    program: Callable[..., Any], settings: Settings, budget: Budget, measured: Measured, *, is_one_of_many: bool = False
) -> None:
    """Remember how a compile ended, for :func:`recall`.

    A costly ending replaces a success. Of `is_one_of_many` regions a success replaces a costly ending: each has only a share.
    """
    key = _key(program, settings)
    if key is None or measured.outcome not in ("compiled", *_COSTLY):
        return
    with _lock:
        endings = _known.setdefault(key, {})
        if measured.strategy not in endings or (measured.outcome in _COSTLY) != is_one_of_many:
            endings[measured.strategy] = measured, budget
        while len(_known) > MAX_KNOWN:
            del _known[next(iter(_known))]


def recall(program: Callable[..., Any], settings: Settings, budget: Budget) -> tuple[Measured, ...]:
    """What is known of programs equal to this one: what compiled within `budget`, and what did not with at least as much."""
    key = _key(program, settings)
    with _lock:
        endings = tuple(_known.get(key, {}).values()) if key is not None else ()
    return tuple(measured for measured, past_budget in endings if _tells(measured, past_budget, budget))


def note_seconds(part: Part, settings: Settings, ending: Ending) -> None:
    """Remember how long the compile of `part` took, for :func:`estimate_s`."""
    key = _key(part.targets[0], settings)
    if key is None or ending.outcome == "cancelled":
        return
    with _lock:
        _seconds[key] = ending.seconds
        while len(_seconds) > MAX_KNOWN:
            del _seconds[next(iter(_seconds))]


def estimate_s(part: Part, settings: Settings) -> float:
    """The seconds that the compile of `part` may take, for its place in the queue: those of an equal one, or by its size."""
    target = part.targets[0]
    key = _key(target, settings)
    with _lock:
        seconds = _seconds.get(key) if key is not None else None
    if seconds is not None:
        return seconds
    num_modules = sum(1 for _ in target.modules()) if isinstance(target, torch.nn.Module) else 1
    return SECONDS_A_MODULE * num_modules + (FIRST_SECONDS if settings.is_inductor else 0.0)


def forget() -> None:
    """Forget every measurement."""
    with _lock:
        _known.clear()
        _seconds.clear()


def _tells(measured: Measured, past_budget: Budget, budget: Budget) -> bool:
    if measured.outcome == "compiled":
        return measured.seconds <= budget.seconds
    return _is_within(budget, past_budget)


def _is_within(budget: Budget, outer: Budget) -> bool:
    has_less_memory = outer.limit_bytes is None or (budget.limit_bytes is not None and budget.limit_bytes <= outer.limit_bytes)
    return budget.seconds <= outer.seconds and has_less_memory


def _key(program: Callable[..., Any], settings: Settings) -> Hashable | None:
    """Equal for two modules of the same structure that are compiled in the same way; None for what has no structure."""
    if not isinstance(program, torch.nn.Module):
        return None
    options = tuple(sorted((name, repr(value)) for name, value in settings.options.items()))
    key = structure(program), settings.backend, settings.mode, options, settings.fullgraph, settings.dynamic
    return key if isinstance(settings.backend, Hashable) else None
