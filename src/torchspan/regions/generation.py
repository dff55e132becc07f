"""What serves the calls of a region: Generations, each of one signature and one state of the program, or of many sizes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

from torchspan.regions.agreement import Agreement
from torchspan.regions.call import Call
from torchspan.regions.handback import FromArtifact, FromCaches
from torchspan.regions.record import Record
from torchspan.regions.signature import Dims, Sizes, differing, general, has_negative_zero, numbers

MAX_MISFITS = 3  # of sizes that the code of dynamic shapes turns out not to serve
MAX_FAILED = 2  # of calls that differ in plain values only, or in the program's state
MAX_UNSERVED = 8
PATIENCE = 3  # calls of other values that pass before one of them takes over what is ready
_MAX_KNOWN = 256  # signatures that are remembered to be served


@dataclass(eq=False)
class Generation:
    """What serves calls like the one that it was opened for: of its `signature`, or of a `family`, where only `dims` differ.

    `sizes` are those of that call; `proven` are the sizes of the call that its code was checked with. A generation `is_odd` if
    it was opened for a call that cannot be compiled: that it fails says nothing about other calls. Where its code issues
    collectives, the ranks of the job take over by `agreement`.
    """

    stage: Literal["compiling", "ready", "swapped", "eager"] = "compiling"
    error: str | None = None
    code: FromArtifact | FromCaches | None = None
    wants_artifact: bool = False
    is_traced: bool = False
    is_odd: bool = False
    num_damaged: int = 0
    num_unchecked: int = 0
    num_missed: int = 0
    num_passed: int = 0
    num_unserved: int = 0  # calls in which its guards held before, and not any longer inside
    signature: Hashable = None
    key: Hashable = None
    sizes: Sizes = ()
    family: Family | None = None
    dims: Dims = ()
    proven: Sizes = ()
    lock: threading.Lock = field(default_factory=threading.Lock)
    done: threading.Event = field(default_factory=threading.Event)
    cancel: threading.Event = field(default_factory=threading.Event)
    why_cancelled: str = ""
    agreement: Agreement | None = None
    record: Record | None = None  # by which the next start of the program loads its code
    first_run: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def of(cls, call: Call, *, family: Family | None = None, dims: Dims = (), wants_artifact: bool = False) -> Generation:
        """A new generation, to be compiled for `call`."""
        return cls(
            signature=call.signature,
            key=call.family,
            sizes=call.sizes,
            family=family,
            dims=dims,
            wants_artifact=wants_artifact,
        )

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

    @property
    def kind(self) -> Literal["artifact", "caches"]:
        """How its code is to come back from the compile process."""
        return "artifact" if self.wants_artifact else "caches"

    @property
    def is_of_earlier_run(self) -> bool:
        """Whether its code is what an earlier run of the program compiled."""
        return self.record is not None and self.record.is_loaded

    @property
    def is_agreeing(self) -> bool:
        """Whether it waits for all ranks to agree on the call that takes it over."""
        return self.stage == "ready" and self.agreement is not None

    @property
    def has_own_guards(self) -> bool:
        """Whether its code was traced in a real call: code that was traced in a check has guards on a copy of the program."""
        return isinstance(self.code, FromArtifact) or self.first_run.is_set()

    @property
    def was_dynamic(self) -> bool:
        """Whether it was given up because dynamic shapes do not work here; each size may be compiled by itself."""
        return self.stage == "eager" and self.family is not None and self.family.is_static

    def covers(self, call: Call) -> bool:
        """Whether it is for calls of these sizes and numbers; strings and booleans may differ."""
        if self.key != call.family:
            return False
        varies = _varying(self.sizes, call.sizes)
        return not any(varies) or (any(self.dims) and _covers(self.dims, varies) and _covers(general(call.sizes), self.dims))

    def is_exactly_for(self, call: Call) -> bool:
        """Whether it is for this call, with every plain value the same."""
        if self.signature == call.signature:
            return True
        if not self.covers(call) or has_negative_zero(call.sizes) or has_negative_zero(self.sizes):
            return False
        return _covers(_varying(self.sizes, call.sizes), differing(self.sizes, call.sizes))

    def serves(self, call: Call) -> bool:
        """Whether its code's guards hold in this call."""
        if self.stage != "swapped" or self.code is None:
            return False
        if self.signature != call.signature and (has_negative_zero(call.sizes) or has_negative_zero(self.sizes)):
            return False  # which torch's guards do not tell from 0.0
        if not self.has_own_guards:
            return self.is_exactly_for(call)
        return self.code.serves(call.target, call.args, call.kwargs)


@dataclass(eq=False)
class Family:
    """Calls that differ only in numbers and in the sizes of their tensors; `first` are the sizes of the first such call."""

    first: Sizes
    generations: list[Generation] = field(default_factory=list)
    num_misfits: int = 0

    def widened(self, sizes: Sizes) -> Dims | None:
        """The dimensions that have varied, these `sizes` included; None where torch would specialize one (a size of 0 or 1)."""
        varying = [_varying(self.first, sizes), *(generation.dims for generation in self.generations)]
        dims = tuple(frozenset().union(*of_tensor) for of_tensor in zip(*varying, strict=True))
        return dims if any(dims) and _covers(general(sizes), dims) else None

    def give_up(self) -> None:
        """Have each size compiled by itself from now on."""
        self.generations.clear()
        self.num_misfits = MAX_MISFITS + 1

    @property
    def is_static(self) -> bool:
        """Whether dynamic shapes were given up for these calls."""
        return self.num_misfits > MAX_MISFITS


class Generations:
    """The generations of one region.

    A signature that a generation has served is *known*: its calls go to that generation, and no guards are checked to find it.
    A signature whose calls came in several states of the program is *contested*: guards are checked before each of its calls.
    """

    def __init__(self) -> None:
        self.opened: list[Generation] = []
        self.families: dict[Hashable, Family] = {}
        self._known: OrderedDict[Hashable, Generation] = OrderedDict()
        self._contested: set[Hashable] = set()
        self._latest: Generation | None = None  # the one that served the last call for which guards were checked

    def find(self, call: Call) -> Generation | None:
        """The generation that is known to serve calls like this one, without checking guards; None if there is none."""
        return self._known.get(call.signature)

    def serving(self, call: Call) -> Generation | None:
        """The generation whose guards hold in this call; it is tried first the next time."""
        in_turn = self.opened if self._latest is None else [self._latest, *self.opened]
        self._latest = next((generation for generation in in_turn if generation.serves(call)), None)
        if self._latest is not None:
            self.remember(self._latest, call)
        return self._latest

    def remember(self, generation: Generation, call: Call) -> None:
        """Note that `generation` serves calls like this one, unless their signature is contested."""
        if call.signature not in self._contested:
            self._known[call.signature] = generation
            if len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)

    def meant(self, call: Call) -> Generation | None:
        """The generation for this call among those that are not swapped: ready, or compiling, or given up."""
        unswapped = [generation for generation in self.opened if generation.stage != "swapped" and not generation.was_dynamic]
        exact = [generation for generation in unswapped if generation.is_exactly_for(call)]
        alike = [generation for generation in unswapped if generation not in exact and generation.covers(call)]
        for candidates, limit in ((exact, MAX_FAILED if call.signature in self._contested else 1), (alike, MAX_FAILED)):
            for stage in ("ready", "compiling"):
                for generation in candidates:
                    if generation.stage == stage:
                        return generation
            failed = [generation for generation in candidates if generation.stage == "eager"]
            if len(failed) >= limit:
                return failed[0]
        return None

    def beaten(self, call: Call) -> list[Generation]:
        """The swapped generations for exactly this call; only called when none has guards that hold in it."""
        return [generation for generation in self.opened if generation.stage == "swapped" and generation.is_exactly_for(call)]

    def open(self, generation: Generation) -> Generation:
        """Add a generation."""
        self.opened = [*self.opened, generation]
        return generation

    def contest(self, call: Call) -> bool:
        """Note that the guards of the known generation failed in this call; gives whether it was contested before."""
        was_asked = call.signature in self._contested
        self._known.pop(call.signature, None)
        self._contested.add(call.signature)
        return was_asked

    def note_raised(self, call: Call) -> None:
        """Note that the program raises in this call: if its generation fails, that says nothing about other calls."""
        for generation in self.opened:
            if generation.signature == call.signature and generation.stage in ("compiling", "eager"):
                generation.is_odd = True

    @property
    def num_counted(self) -> int:
        """How many count against the limit; odd ones do not."""
        return sum(not generation.is_odd for generation in self.opened)

    @property
    def num_compiled(self) -> int:
        """How many have code, or had it once."""
        return sum(bool(generation.proven) or generation.stage in ("ready", "swapped") for generation in self.opened)

    def all(self) -> list[Generation]:
        """All generations."""
        return self.opened


def _varying(first: Sizes, sizes: Sizes) -> Dims:
    """In which dimensions and numbers two calls differ."""
    return tuple(varying & numeric for varying, numeric in zip(differing(first, sizes), numbers(sizes), strict=True))


def _covers(dims: Dims, others: Dims) -> bool:
    return all(wide >= narrow for wide, narrow in zip(dims, others, strict=True))


def describe(first: Sizes, sizes: Sizes) -> str:
    """How two calls' sizes and numbers differ, for a Report.

    >>> describe(((2, 3), (3,), (0.5, 4)), ((4, 3), (3,), (0.7, 4)))
    'tensor 0 of the inputs is 2×3 and 4×3, a number among the arguments is 0.5 and 0.7'
    """
    pairs = enumerate(zip(first[:-1], sizes[:-1], strict=True))
    differences = [f"tensor {i} of the inputs is {_times(a)} and {_times(b)}" for i, (a, b) in pairs if a != b]
    numbers_now = [(first[-1][place], sizes[-1][place]) for place in sorted(_varying(first, sizes)[-1])]
    return ", ".join([*differences, *(f"a number among the arguments is {a!r} and {b!r}" for a, b in numbers_now)])


def _times(size: tuple[int, ...]) -> str:
    return "×".join(map(str, size))
