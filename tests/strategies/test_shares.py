"""What each kind of region may spend of a budget: one that hangs leaves the others their share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import torchspan
from torchspan.core.errors import InputError
from torchspan.core.report import Outcome
from torchspan.jobs import transport
from torchspan.jobs.budget import Allowance, Budget
from torchspan.jobs.supervisor import Ending, Job, run_bounded
from torchspan.regions import compiling
from torchspan.strategies import _measured
from torchspan.strategies._plan import Plan

Wait = Callable[..., None]


@pytest.fixture(autouse=True)
def nothing_is_measured() -> Iterator[None]:
    _measured.forget()
    yield
    _measured.forget()


class Kind(nn.Module):
    """A block of its own kind, by its width; its compile hangs, or not."""

    def __init__(self, width: int, hangs: bool) -> None:
        super().__init__()
        self.inner, self.outer, self.hangs = nn.Linear(4, width), nn.Linear(width, 4), hangs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(x).sin() if self.hangs else self.inner(x).relu())


class Blocks(nn.Module):
    """Kinds of blocks, each once, the last twice: what stands beside a repeated block is one too."""

    def __init__(self, hangs: tuple[bool, ...]) -> None:
        super().__init__()
        kinds = [Kind(5 + number, is_hanging) for number, is_hanging in enumerate(hangs)]
        self.parts = nn.ModuleList([*kinds, Kind(4 + len(hangs), hangs[-1])])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part(x)
        return x


def compiled_or_timed_out(job: Job, budget: Budget, cancel: Any = None, *, share_s: float) -> Ending:
    """A child for what compiles, however slow this machine is; for what hangs, how it ends, at once."""
    if transport.loads(job.payload).target.hangs:
        return Ending("timeout", share_s, cause=f"not done after {share_s:.3f} s")
    return replace(run_bounded(job, Budget(600), cancel), seconds=0.5)


def test_three_of_six_compiles_hang_and_the_other_three_are_swapped(monkeypatch: pytest.MonkeyPatch, until: Wait) -> None:
    monkeypatch.setattr(compiling, "run_bounded", compiled_or_timed_out)
    model, x = Blocks((True, False, True, False, True, False)), torch.ones(2, 4)
    with torch.no_grad():
        compiled = torchspan.partial_compile(model, budget=Budget(20), backend="eager")
        expected = model(x)
        until(lambda: len(compiled.report.attempts) == 6, lambda: compiled(x))
        assert torch.equal(compiled(x), expected)
    regions = plan_of(compiled)._regions
    assert [region.has_failed for region in regions] == [True, False, True, False, True, False]
    outcomes = [attempt.outcome for attempt in compiled.report.attempts]  # a turn ends before its attempt is written down
    assert sorted(outcomes) == ["compiled"] * 3 + ["timeout"] * 3
    assert [attempt.cause for attempt in compiled.report.attempts if attempt.outcome == "timeout"] == [
        "not done after 3.333 s",  # of 20 s
        "not done after 4.042 s",  # of 16.2 s that four share
        "not done after 5.812 s",  # of 11.6 s that two share
    ]
    assert "swap_stall_s" in compiled.report.figures


def blocks(hangs: int, budget: Budget, **arguments: Any) -> Any:
    return torchspan.partial_compile(Blocks((True,) * hangs), budget=budget, backend="eager", **arguments)


def plan_of(program: Any) -> Plan:
    plan: Plan = program._torchspan_plan
    return plan


def spend(program: Any, number: int, seconds: float, has_compiled: bool = False) -> Allowance | Ending:
    """Let the region of that number have a turn in which it takes so many seconds; what it was allowed."""
    plan = plan_of(program)
    part = plan._regions[number].part
    with plan.turn(part, lambda: False, has_compiled) as allowed:
        if isinstance(allowed, Allowance):
            plan.spend("per_block", part, Ending("timeout", seconds))
    return allowed


def shares(*allowances: Allowance | Ending) -> list[float | str | None]:
    return [round(allowance.share_s, 3) if isinstance(allowance, Allowance) else allowance.cause for allowance in allowances]


@pytest.mark.once
def test_each_kind_has_an_equal_share_of_what_is_left_and_what_one_leaves_over_goes_to_the_others() -> None:
    program = blocks(4, Budget(20))
    assert shares(spend(program, 0, 5), spend(program, 1, 0), spend(program, 2, 1), spend(program, 3, 14)) == [5, 5, 7.5, 14]
    assert shares(spend(program, 3, 1)) == ["nothing is left of the budget"]


@pytest.mark.once
def test_a_kind_whose_share_is_spent_has_no_other_for_its_next_signature() -> None:
    program = blocks(4, Budget(20))
    assert shares(spend(program, 0, 2), spend(program, 0, 3)) == [5, 3]
    assert shares(spend(program, 0, 1)) == ["nothing is left of its share of the budget: it took 5 s"]
    assert shares(spend(program, 1, 5), spend(program, 0, 1, has_compiled=True)) == [
        5,
        20,
    ]  # what compiled once has it all again


@pytest.mark.once
def test_a_share_that_was_asked_for_is_the_time_out_of_each_kind() -> None:
    program = blocks(4, Budget(20, region_seconds=8))
    assert shares(spend(program, 0, 8), spend(program, 1, 8), spend(program, 2, 4)) == [8, 8, 4]
    with pytest.raises(InputError, match="budget of 0 seconds"):
        Budget(20, region_seconds=0)


@pytest.mark.once
def test_a_strategy_of_which_some_regions_compiled_is_not_left_out_the_next_time() -> None:
    budget = Budget(20)
    program = torchspan.compile(Blocks((True,) * 3), strategy="per_block", budget=budget, backend="eager")
    plan = plan_of(program)
    outcomes: tuple[Outcome, ...] = ("timeout", "compiled", "timeout")
    for region, outcome in zip(plan._regions, outcomes, strict=True):
        plan.spend("per_block", region.part, Ending(outcome, 1.0))
    (known,) = _measured.recall(Blocks((True,) * 3), plan.settings, budget)
    assert known.outcome == "compiled"


@pytest.mark.once
def test_what_took_long_before_is_thought_to_take_as_long_and_else_size_decides() -> None:
    program = blocks(2, Budget(20))
    plan = plan_of(program)
    small, part = (region.part for region in plan._regions)
    assert _measured.estimate_s(small, plan.settings) == pytest.approx(3 * _measured.SECONDS_A_MODULE)
    plan.spend("per_block", part, Ending("timeout", 12.0))
    again = blocks(2, Budget(20))
    assert _measured.estimate_s(plan_of(again)._regions[1].part, plan.settings) == 12.0
