"""A call of what torch has itself, with every backport in force over without: goal 1.00, as nothing of it is wrapped."""

from __future__ import annotations

import timeit
from collections.abc import Callable

import _harness as harness
import torch

import torchspan


def calls() -> dict[str, Callable[[], object]]:
    """What is called, looked up anew, as a program that was activated before does."""
    x, norm = torch.ones(8), torch.nn.LayerNorm(8)
    functional = torch.nn.functional
    return {
        "torch.zeros(3)": lambda: torch.zeros(3),
        "x + x": lambda: x + x,
        "functional.relu(x)": lambda: functional.relu(x),
        "LayerNorm(x)": lambda: norm(x),
    }


def main() -> None:
    """Measure and write."""
    options = harness.arguments(__doc__ or "", repeats=31, number=20000)
    rows = []
    for name, call in calls().items():

        def timed(is_active: bool, call: Callable[[], object] = call) -> float:
            if not is_active:
                return timeit.timeit(call, number=options.number) / options.number * 1e6
            with torchspan.activate(device="off"):
                return timeit.timeit(call, number=options.number) / options.number * 1e6

        ours, theirs = harness.in_turn(lambda: timed(True), lambda: timed(False), options.repeats)
        rows.append(harness.Row(name, ours, theirs, "µs", goal=1.0))
    harness.write("native_call_overhead", rows, options.out)


if __name__ == "__main__":
    main()
