"""Budget: the seconds and bytes that a compile may spend, counted over its whole process tree."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torchspan.core.errors import InputError
from torchspan.core.text import format_bytes, parse_bytes

MAX_SECONDS = 7 * 24 * 3600.0


@dataclass(frozen=True)
class Budget:
    """What one compile may spend: wall-clock `seconds`, and resident `memory` of everything that it starts.

    `memory` is a number of bytes or text such as ``4GiB``; None sets no limit. Where a program is compiled in several regions,
    each kind of region may take `region_seconds` of the `seconds`; by default an equal share of what is left when it begins, so
    that what one leaves over goes to those after it. Raises InputError for zero and less.

    >>> Budget(seconds=120, memory="4GiB")
    Budget(seconds=120.0, memory=4294967296, region_seconds=None)
    >>> Budget(seconds=0)
    Traceback (most recent call last):
    torchspan.core.errors.InputError: budget of 0 seconds; expected more than 0, such as Budget(seconds=120)
    """

    seconds: float = 300.0
    memory: str | int | None = "8GiB"
    region_seconds: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "seconds", _check_seconds(self.seconds))
        object.__setattr__(self, "memory", _check_memory(self.memory))
        if self.region_seconds is not None:
            object.__setattr__(self, "region_seconds", _check_seconds(self.region_seconds))

    @property
    def limit_bytes(self) -> int | None:
        """The limit of resident bytes, or None."""
        return None if self.memory is None else int(self.memory)

    def share_s(self, left_s: float, num_kinds: int) -> float:
        """The seconds that one of `num_kinds` kinds of region, which have yet to be compiled in `left_s` seconds, may take.

        >>> Budget(seconds=60).share_s(60, 6), Budget(seconds=60, region_seconds=15).share_s(60, 6)
        (10.0, 15.0)
        """
        return left_s / max(num_kinds, 1) if self.region_seconds is None else min(left_s, self.region_seconds)

    def __str__(self) -> str:
        memory = "no memory limit" if self.limit_bytes is None else format_bytes(self.limit_bytes)
        return f"{self.seconds:g} s, {memory}"


def _check_seconds(seconds: object) -> float:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or math.isnan(seconds):
        raise InputError(f"budget of {seconds!r} seconds; expected a number, such as Budget(seconds=120)")
    if seconds <= 0:
        raise InputError(f"budget of {seconds:g} seconds; expected more than 0, such as Budget(seconds=120)")
    return min(float(seconds), MAX_SECONDS)


def _check_memory(memory: str | int | None) -> int | None:
    if memory is None:
        return None
    limit_bytes = parse_bytes(memory)
    if limit_bytes <= 0:
        raise InputError(f"budget of {memory!r} memory; expected more than 0 bytes, such as Budget(memory='4GiB')")
    return limit_bytes


@dataclass(frozen=True)
class Allowance:
    """What one job may spend: a `budget`, and of its seconds `share_s` for the job itself, without a server's start."""

    budget: Budget
    share_s: float


DEFAULT_BUDGET = Budget()
