"""Hooks that a model gets, or loses, after its compiled code took over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torchspan
from torchspan.jobs.budget import Budget
from torchspan.strategies import report_of

Wait = Callable[..., None]
KINDS: dict[str, Callable[..., Any]] = {
    "forward": lambda module, note: module.register_forward_hook(lambda module, args, out: note("forward")),
    "before the forward": lambda module, note: module.register_forward_pre_hook(lambda module, args: note("before")),
    "backward": lambda module, note: module.register_full_backward_hook(lambda module, into, out: note("backward")),
}


@pytest.mark.parametrize("is_root", [True, False], ids=["root", "child"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_that_comes_after_the_swap_fires_once_a_call_until_it_is_removed(kind: str, is_root: bool, until: Wait) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(4, 8, requires_grad=True)
    compiled = torchspan.compile(model, backend="eager", strategy="whole", budget=Budget(300, "6GiB"))
    until(lambda: "swap_stall_s" in report_of(compiled).figures, lambda: compiled(x).sum().backward())
    events: list[Any] = []
    handle = KINDS[kind](compiled if is_root else compiled[0], events.append)
    for count in range(1, 4):
        compiled(x).sum().backward()
        assert len(events) == count
    handle.remove()
    compiled(x).sum().backward()
    assert len(events) == 3


def test_calls_under_hooks_on_all_modules_are_eager_and_others_compiled(until: Wait) -> None:
    model, x, events = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(4, 8), []
    compiled = torchspan.compile(model, backend="eager", strategy="whole", budget=Budget(300, "6GiB"))
    until(lambda: "swap_stall_s" in report_of(compiled).figures, lambda: compiled(x))
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: events.append(type(module).__name__))
    try:
        compiled(x)
    finally:
        handle.remove()
    assert events == ["Linear", "ReLU", "Sequential"]
    assert report_of(compiled).decisions[-1].reason.startswith("there are hooks on all modules")
    compiled(x)
    assert len(events) == 3
