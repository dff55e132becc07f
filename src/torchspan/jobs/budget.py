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

    `memory` is a number of bytes or text such as ``4GiB``; None sets no limit. Raises InputError for zero and less.

    >>> Budget(seconds=120, memory="4GiB")
    Budget(seconds=120.0, memory=4294967296)
    >>> Budget(seconds=0)
    Traceback (most recent call last):
    torchspan.core.errors.InputError: budget of 0 seconds; expected more than 0, such as Budget(seconds=120)
    """

    seconds: float = 300.0
    memory: str | int | None = "8GiB"

    def __post_init__(self) -> None:
        object.__setattr__(self, "seconds", _check_seconds(self.seconds))
        object.__setattr__(self, "memory", _check_memory(self.memory))

    @property
    def limit_bytes(self) -> int | None:
        """The limit of resident bytes, or None."""
        return None if self.memory is None else int(self.memory)

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


DEFAULT_BUDGET = Budget()
