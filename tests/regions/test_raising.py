"""A program whose operators raise in some calls: after such a call everything is as eager leaves it, compiled or not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torchspan
from torchspan.core.numerics import difference
from torchspan.jobs.budget import Budget
from torchspan.strategies import report_of

Wait = Callable[..., None]


class Looks(nn.Module):
    """Counts, draws, breaks its graph (perhaps), and looks up rows, of which there are four."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.rows, self.breaks, self.noted = nn.Embedding(4, 4), breaks, []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        self.count += 1
        x = torch.rand(4) + self.count
        if self.breaks:
            self.noted.append(self.count.item())
            self.count += 1
        return self.rows(index) + torch.rand(4) * x


def outcome(program: nn.Module, index: torch.Tensor) -> list[Any]:
    """What a call gives or raises, and what it leaves behind."""
    torch.manual_seed(0)
    try:
        result: Any = program(index)
    except IndexError as error:
        result = str(error)
    return [result, program.count.clone(), list(program.noted), torch.get_rng_state()]


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")  # torch 2.8, of the list's append
@pytest.mark.parametrize("wants_grad", [True, False])
@pytest.mark.parametrize("breaks", [False, True], ids=["one graph", "two graphs"])
def test_a_call_that_raises_has_counted_and_drawn_once(breaks: bool, wants_grad: bool, until: Wait) -> None:
    eager = Looks(breaks)
    compiled = torchspan.compile(copy.deepcopy(eager), backend="eager", strategy="whole", budget=Budget(300, "6GiB"))
    good, bad = torch.tensor([0, 3]), torch.tensor([0, 9])

    def both(index: torch.Tensor) -> None:
        assert difference(outcome(compiled, index), outcome(eager, index)) is None

    with torch.set_grad_enabled(wants_grad):
        until(lambda: "swap_stall_s" in report_of(compiled).figures, lambda: both(good))
        for index in (good, bad, good, bad, good):
            both(index)
