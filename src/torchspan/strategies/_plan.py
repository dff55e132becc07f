"""A Plan: one compiled program, its ladder of strategies, its Budget and its Report."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from torchspan.core.program import program_name
from torchspan.core.report import Attempt, Report, current_report
from torchspan.jobs.budget import Allowance, Budget
from torchspan.jobs.supervisor import Ending
from torchspan.jobs.turns import Wish, turns
from torchspan.regions.backward import is_in_backward
from torchspan.regions.part import Part
from torchspan.regions.region import Region
from torchspan.regions.settings import Settings
from torchspan.regions.transformers import is_gathering, layer_index, own_layer
from torchspan.strategies import _measured
from torchspan.strategies._base import Request, cut, needs_profile
from torchspan.strategies._ladder import Ladder
from torchspan.strategies._step import Profiler

Verify = Literal["first", "off", "always"]
Handback = Literal["auto", "artifact", "caches"]
FIRST_SHARE = 0.6  # of what is left of the budget, for a rung that has another one below it
_within = threading.local()


@dataclass(frozen=True)
class Conduct:
    """How a Plan compiles: how often code is checked, whether calls wait and show progress, how code comes back, how to cut."""

    verify: Verify = "first"
    wait: bool = False
    progress: bool = False
    handback: Handback = "auto"
    request: Request = field(default_factory=Request)


class Plan:
    """Cuts `program` by the first strategy of `ladder` that has parts, and by the next when all of them fail."""

    def __init__(
        self,
        program: Callable[..., Any],
        ladder: Ladder,
        budget: Budget,
        settings: Settings,
        conduct: Conduct,
        report: Report,
    ) -> None:
        self.program = program
        self._called: Callable[[], Callable[..., Any] | None] = lambda: None
        self.settings = settings
        self.verify = conduct.verify
        self.is_waiting = conduct.wait
        self.shows_progress = conduct.progress
        self._conduct = conduct
        self.report = report
        self._budget = budget
        self._ladder = ladder
        self._rungs = list(ladder.strategies)
        self._spent_s = 0.0
        self._lock = threading.RLock()
        self._rung_ends_s = budget.seconds  # when that much is spent, the rest is for the rungs below
        self._spent_of: dict[int, float] = {}  # what each part of this rung that has had a turn took
        self._why_ended: str | None = None
        self._regions: tuple[Region, ...] = ()
        self._root: Region | None = None
        self._first: tuple[str, tuple[Region, ...]] | None = None  # the first rung that had regions
        self._profiler: Profiler | None = None
        self._request = conduct.request
        self._overhead_s = 0.0
        self._is_first = True
        report.decide("compile", program_name(program), " → ".join(self._rungs), ladder.reason)
        self._next_rung()

    @property
    def called(self) -> Callable[..., Any]:
        """The object that is called: the compiled module, or the program if there is none."""
        return self._called() or self.program

    def stand_in(self, compiled: torch.nn.Module) -> None:
        """Call `compiled` from now on; this does not keep it alive."""
        self._called = weakref.ref(compiled)

    def end(self, why: str) -> None:
        """End its compiles and start no more: the compiled program was deleted."""
        self._why_ended = why
        for region in self._regions:
            region.end(why)

    def for_program(self, program: Callable[..., Any]) -> Plan:
        """A plan of its own for a copy of this one's program."""
        report = Report(parent=current_report())
        return Plan(program, self._ladder, self._budget, self.settings, self._conduct, report)

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the program: compiled where code is ready, eagerly elsewhere."""
        if not self._is_first:
            return self._call(args, kwargs)
        outputs = self._call(args, kwargs)
        if self._is_first:
            self._is_first = False
            self.report.figure("first_step_wait_s", self._overhead_s)
        return outputs

    def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        root = self._root
        if root is not None:
            return root.call(self.called if root.part.is_called_inside else self.program, args, kwargs)
        profiler = self._profiler
        if profiler is not None and profiler.takes_turn():
            return self._call_profiled(profiler, args, kwargs)
        with inside(self):
            if self.called is not self.program and type(self.program).__call__ is torch.nn.Module.__call__:
                return self.called._call_impl(*args, **kwargs)  # type: ignore[attr-defined]
            return self.program(*args, **kwargs)

    def _call_profiled(self, profiler: Profiler, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run eagerly under the profiler, and cut the program by its profile."""
        outputs, profile = profiler.run(args, kwargs)
        with self._lock:
            self._profiler, self._request = None, replace(self._request, profile=profile)
            self._next_rung_if_any()
        return outputs

    def has_moved_on(self, part: Part) -> bool:
        """Whether another rung than that of `part` serves calls now."""
        return self._root is None or self._root.part is not part

    def call_again(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """For callers that wait: go on with the rung that followed one that failed."""
        return self._call(args, kwargs)

    def wants_artifact(self, part: Part) -> bool:
        """Whether the child is to make an artifact of `part`, which falls back to torch's caches if it cannot.

        By default for a whole program that is called without gradients, which is then taken over without a stall. In training a
        step of an artifact takes longer (1.07 times torch.compile's was measured: it keeps what the forward saved to the end of
        the backward), which every step would feel, and the stall of a trace only one. A block, called many times a step, would
        feel the guards, which are checked in Python (about 0.1 ms).
        """
        if not self.settings.is_plain or self._conduct.handback == "caches" or part.nested:
            return False
        return self._conduct.handback == "artifact" or not (part.is_block or torch.is_grad_enabled())

    # the ladder

    def _next_rung(self) -> None:
        while self._rungs:
            if self._must_profile(self._rungs[0]):
                return
            strategy = self._rungs.pop(0)
            result = cut(strategy, self.program, self._request)
            if result.parts or strategy == "eager":
                self.report.decide("compile", program_name(self.program), strategy, result.reason)
                self._install(strategy, tuple(Region(part, strategy, self) for part in result.parts))
                if strategy == "eager" and self._first is not None and any(region.may_try_others for region in self._first[1]):
                    self._install(*self._first)  # what failed was one kind of call: others are tried
                return
            self.report.decide("compile", program_name(self.program), f"not {strategy}", result.reason)

    def _must_profile(self, strategy: str) -> bool:
        """Whether a step has to be profiled before `strategy` can cut; if so, one will be."""
        if self._request.profile is not None or not isinstance(self.program, torch.nn.Module) or not needs_profile(strategy):
            return False
        self._profiler, self._root = Profiler(self.program), None
        self.report.decide("compile", program_name(self.program), "profile", f"{strategy} goes by the second call, run eagerly")
        return True

    def _install(self, strategy: str, regions: tuple[Region, ...]) -> None:
        self._regions = regions
        remaining_s = self._budget.seconds - self._spent_s
        self._rung_ends_s = self._spent_s + remaining_s * (FIRST_SHARE if any(rung != "eager" for rung in self._rungs) else 1.0)
        self._spent_of.clear()
        if regions and self._first is None:
            self._first = strategy, regions
        for region in regions:
            if region.part.is_block:
                for block in region.part.targets:
                    block._compiled_call_impl = BlockCall(region, block, self)  # type: ignore[attr-defined, arg-type]
        self._root = next((region for region in regions if not region.part.is_block), None)

    def part_failed(self, part: Part) -> None:
        """A region has nothing compiled: if that is so for all of this rung, the next one is tried."""
        with self._lock:
            if not self._rungs:
                return
            if any(region.part is part for region in self._regions) and all(region.has_failed for region in self._regions):
                for region in self._regions:
                    _uninstall(region)
                self._next_rung_if_any()

    def _next_rung_if_any(self) -> None:
        """Go to the next rung, or to eager if that raises: there is no caller who could handle the error."""
        try:
            self._next_rung()
        except Exception as cause:  # noqa: BLE001 - of a strategy, which may be anyone's
            message = f"{type(cause).__name__}: {cause}"
            self.report.attempt(
                Attempt("eager", program_name(self.program), "none", "failed", 0.0, cause=message, where="cutting")
            )
            self._rungs.clear()
            self._profiler, self._root = None, None
            self._install("eager", ())

    # the budget

    @contextmanager
    def turn(self, part: Part, is_cancelled: Callable[[], bool], has_compiled: bool) -> Iterator[Allowance | Ending]:
        """Wait for the turn to have a child for `part`, and give it what it may spend; or why there is none.

        A program has one child at a time, so that it takes no more memory than its budget has.
        """
        wish = Wish(self, _measured.estimate_s(part, self.settings), self._budget.limit_bytes)
        arrived = time.monotonic()
        with turns.turn(wish, is_cancelled) as has_come:
            if self._why_ended is not None or not has_come:
                why = self._why_ended or "the compile servers were ended"
                yield Ending("cancelled", time.monotonic() - arrived, cause=why)
                return
            self.report.figure("turn_wait_s", self.report.figures.get("turn_wait_s", 0.0) + time.monotonic() - arrived)
            yield self._allowance(part, has_compiled)

    def _allowance(self, part: Part, has_compiled: bool) -> Allowance | Ending:
        """What a child for `part` may spend. A region that `has_compiled` gets the whole budget for each new signature."""
        if has_compiled:
            return Allowance(self._budget, self._budget.share_s(self._budget.seconds, 1))
        remaining_s = self._rung_ends_s - self._spent_s
        if remaining_s <= 0:
            return Ending("skipped", 0.0, cause="nothing is left of the budget")
        spent = self._spent_of.setdefault(id(part), 0.0)
        num_kinds = 1 + sum(id(region.part) not in self._spent_of for region in self._regions)
        share = self._budget.share_s(remaining_s + spent, num_kinds) - spent
        if share <= 0:
            return Ending("skipped", 0.0, cause=f"nothing is left of its share of the budget: it took {spent:.3g} s")
        return Allowance(replace(self._budget, seconds=remaining_s), min(share, remaining_s))

    def spend(self, strategy: str, part: Part, ending: Ending) -> None:
        """Count what a child took, and remember how it ended."""
        self._spent_s += ending.seconds
        self._spent_of[id(part)] = self._spent_of.get(id(part), 0.0) + ending.seconds
        _measured.note_seconds(part, self.settings, ending)
        if not self._request.asked:  # else it was only a part of what the strategy compiles
            measured = _measured.Measured(strategy, ending.outcome, ending.seconds)
            _measured.note(self.program, self.settings, self._budget, measured, is_one_of_many=len(self._regions) > 1)

    # figures

    @contextmanager
    def overhead(self) -> Iterator[None]:
        """Count the time inside as what compiling made a call wait."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._overhead_s += time.perf_counter() - started


class BlockCall:
    """Stands where a module keeps its compiled call; serves calls from within its plan, and leaves all others alone."""

    def __init__(self, region: Region, block: torch.nn.Module, plan: Plan) -> None:
        self._region = region
        self._block = block
        self._plan = plan
        self._layer = layer_index(block)
        self._was_inside = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._block._call_impl(*args, **kwargs)
        # activation checkpointing calls the block again in the backward, where this thread is in no call of the plan
        is_inside = self._was_inside if is_in_backward() else is_within(self._plan)
        self._was_inside = is_inside
        if not is_inside or (is_gathering() and self._stays_eager()):
            return self._block._call_impl(*args, **kwargs)
        own = own_layer(self._block, self._layer, args, kwargs)
        if own is None:
            return self._region.call(self._block, args, kwargs)
        with own.running():
            return own.whole(self._region.call(own.block, own.args, own.kwargs))

    def _stays_eager(self) -> bool:
        """Say, once a region, that calls whose inner results are gathered run eagerly."""
        if not self._region.is_gathered:
            self._region.is_gathered = True
            reason = "what its blocks compute inside is gathered by hooks in this call (such as output_hidden_states)"
            self._plan.report.decide("compile", self._region.part.name, "eager", reason)
        return True

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of the block is not this plan's."""
        return

    def __reduce__(self) -> Any:
        return type(None), ()


def _uninstall(region: Region) -> None:
    for block in region.part.targets if region.part.is_block else ():
        if isinstance(vars(block).get("_compiled_call_impl"), BlockCall):
            del block._compiled_call_impl  # type: ignore[attr-defined]


@contextmanager
def inside(plan: Plan) -> Iterator[None]:
    """Calls of blocks in this thread come from `plan`."""
    stack = _within.__dict__.setdefault("plans", [])
    stack.append(plan)
    try:
        yield
    finally:
        stack.pop()


def is_within(plan: Plan) -> bool:
    """Whether this thread is inside a call of `plan`."""
    return plan in _within.__dict__.get("plans", ())
