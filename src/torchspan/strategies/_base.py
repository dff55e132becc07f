"""What a strategy is: a file of this folder with a SUMMARY and a function `cut` from a program and a Request to Parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchspan.core.errors import InputError
from torchspan.core.registry import Registry
from torchspan.regions.part import Part

if TYPE_CHECKING:
    from torchspan.strategies._step import StepProfile

_STRATEGY_OF = {"layer_indices": "per_block", "max_layers": "per_block", "regions": "regional"}
REGISTRY = Registry("torchspan.strategies", "strategy")


@dataclass(frozen=True)
class Request:
    """What the user asked of a cut: blocks by number, at most `max_layers` of them, or modules by name (`regions`).

    `profile` is of a step of the program, for a strategy with ``NEEDS_PROFILE``; the user does not set it.
    Raises InputError for what no program could have.

    >>> Request(max_layers=0)
    Traceback (most recent call last):
    torchspan.core.errors.InputError: max_layers is 0; expected 1 or more, or None for all
    """

    layer_indices: Sequence[int] | None = None
    max_layers: int | None = None
    regions: Sequence[str] = ()
    profile: StepProfile | None = None

    def __post_init__(self) -> None:
        if self.layer_indices is not None:
            object.__setattr__(self, "layer_indices", _indices(self.layer_indices))
        if self.max_layers is not None and (not _is_int(self.max_layers) or self.max_layers < 1):
            raise InputError(f"max_layers is {self.max_layers!r}; expected 1 or more, or None for all")
        if isinstance(self.regions, str) or not all(isinstance(name, str) for name in self.regions):
            raise InputError(f"regions is {self.regions!r}; expected names of modules, such as ['encoder.layers.*', 'head']")
        object.__setattr__(self, "regions", tuple(self.regions))

    @property
    def asked(self) -> Mapping[str, str]:
        """What it asks for, and the strategy that this is for."""
        is_asked = {
            "layer_indices": self.layer_indices is not None,
            "max_layers": self.max_layers is not None,
            "regions": bool(self.regions),
        }
        return {name: _STRATEGY_OF[name] for name, is_given in is_asked.items() if is_given}


@dataclass(frozen=True)
class Cut:
    """How a strategy cuts a program: its parts, and why they are these (or why there are none)."""

    parts: tuple[Part, ...]
    reason: str


def cut(strategy: str, program: Callable[..., Any], request: Request = Request()) -> Cut:  # noqa: B008 - a frozen value
    """How the strategy of this name cuts `program`; raises UnknownNameError for a name that no strategy has."""
    return REGISTRY.get(strategy).cut(program, request)


def needs_profile(strategy: str) -> bool:
    """Whether the strategy of this name cuts by a profile of an eager step."""
    return bool(getattr(REGISTRY.get(strategy), "NEEDS_PROFILE", False))


def count_of(num: int, noun: str) -> str:
    """A number of things.

    >>> count_of(1, "block"), count_of(3, "block")
    ('1 block', '3 blocks')
    """
    return f"{num} {noun}{'' if num == 1 else 's'}"


def _indices(indices: Any) -> tuple[int, ...]:
    if isinstance(indices, (str, bytes)) or not hasattr(indices, "__iter__"):
        raise InputError(f"layer_indices is {indices!r}; expected numbers of blocks, such as [0, 1, 2] or range(8)")
    numbers = tuple(indices)
    wrong = [index for index in numbers if not _is_int(index)]
    if wrong:
        raise InputError(f"layer_indices has {wrong[0]!r}; expected numbers of blocks, such as [0, 1, 2] or range(8)")
    if not numbers:
        raise InputError("layer_indices is empty; expected numbers of blocks, or None for all; strategy='eager' compiles none")
    return tuple(int(index) for index in numbers)


def _is_int(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
