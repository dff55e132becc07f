"""What serves the calls of a region: a Generation one input signature, or, of dynamic shapes, a Family of signatures."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

from torchspan.regions.call import Call
from torchspan.regions.handback import FromArtifact, FromCaches
from torchspan.regions.signature import Dims, Sizes, differing

MAX_MISFITS = 3  # of sizes that the code of dynamic shapes turns out not to serve


@dataclass(eq=False)
class Generation:
    """What serves one input signature, or those of a `family` that differ in the dimensions `dims` only.

    `proven` are the sizes of the call that its code was checked with.
    """

    stage: Literal["compiling", "ready", "swapped", "eager"] = "compiling"
    error: str | None = None
    code: FromArtifact | FromCaches | None = None
    wants_artifact: bool = False
    is_traced: bool = False
    stale: int = 0
    num_damaged: int = 0
    num_unchecked: int = 0
    family: Family | None = None
    dims: Dims = ()
    proven: Sizes = ()
    lock: threading.Lock = field(default_factory=threading.Lock)
    done: threading.Event = field(default_factory=threading.Event)
    cancel: threading.Event = field(default_factory=threading.Event)
    why_cancelled: str = ""

    def wait(self) -> None:
        """Wait for its compile, which ends if the user interrupts."""
        try:
            self.done.wait()
        except KeyboardInterrupt:
            self.end("the user interrupted the call that waited for it")
            raise

    def end(self, why: str) -> None:
        """End its compile, if a child works on it."""
        self.why_cancelled = why
        self.cancel.set()


@dataclass(eq=False)
class Family:
    """Calls that differ in the sizes of their tensors only: those of the `first`, and what serves some of the others."""

    first: Sizes
    generations: list[Generation] = field(default_factory=list)
    num_misfits: int = 0

    def find(self, sizes: Sizes) -> Generation | None:
        """The generation that is for a call of these sizes."""
        varies = differing(self.first, sizes)
        return next((one for one in self.generations if _covers(one.dims, varies) and _are_general(sizes, one.dims)), None)

    def widened(self, sizes: Sizes) -> Dims | None:
        """The dimensions that vary, those of these sizes included; None where torch would make a case of its own of one."""
        seen = [differing(self.first, sizes), *(one.dims for one in self.generations)]
        dims = tuple(frozenset().union(*of_one) for of_one in zip(*seen, strict=True))
        return dims if any(dims) and _are_general(sizes, dims) else None

    def give_up(self) -> None:
        """Have each size compiled by itself from now on."""
        self.generations.clear()
        self.num_misfits = MAX_MISFITS + 1

    @property
    def is_static(self) -> bool:
        """Whether dynamic shapes do not serve it."""
        return self.num_misfits > MAX_MISFITS


class Generations:
    """Those of one region: of one signature each, and of families."""

    def __init__(self) -> None:
        self.by_signature: dict[Hashable, Generation] = {}
        self.families: dict[Hashable, Family] = {}

    def find(self, call: Call) -> Generation | None:
        """The one that serves such a call, if there is one."""
        found = self.by_signature.get(call.signature)
        if found is not None or not self.families:
            return found
        alike = self.families.get(call.family)
        return alike.find(call.sizes) if alike is not None else None

    def all(self) -> list[Generation]:
        """Every one of them."""
        return [*self.by_signature.values(), *(one for alike in self.families.values() for one in alike.generations)]


def general(sizes: Sizes) -> Dims:
    """Every dimension that code for these sizes can be dynamic in: to torch, a size of 0 or 1 is a case of its own."""
    return tuple(frozenset(dim for dim, length in enumerate(size) if length > 1) for size in sizes)


def _are_general(sizes: Sizes, dims: Dims) -> bool:
    return _covers(general(sizes), dims)


def _covers(dims: Dims, others: Dims) -> bool:
    return all(one >= other for one, other in zip(dims, others, strict=True))


def describe(first: Sizes, sizes: Sizes) -> str:
    """How two calls' sizes differ, for a Report.

    >>> describe(((2, 3), (3,)), ((4, 3), (3,)))
    'tensor 0 of the inputs is 2×3 and 4×3'
    """
    pairs = enumerate(zip(first, sizes, strict=True))
    return ", ".join(f"tensor {i} of the inputs is {_times(a)} and {_times(b)}" for i, (a, b) in pairs if a != b)


def _times(size: tuple[int, ...]) -> str:
    return "×".join(map(str, size))
