"""The device rules' wrapper of a factory beside the least that a wrapper in Python can be: one that passes its arguments on.

Each figure is the least of many short blocks, taken in turn, so that other work on the machine does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import _harness as harness
import torch

from torchspan.core.report import Report
from torchspan.devices._base import device_patches
from torchspan.environment.facts import Facts
from torchspan.environment.scope import Environment

CALLS = 200


def main() -> None:
    """Measure and write."""
    options = harness.arguments(__doc__ or "", repeats=3000)
    torch.set_num_threads(1)
    plain = {"torch.zeros(3)": (torch.zeros, 3), "torch.zeros_like(x)": (torch.zeros_like, torch.ones(3))}
    report = Report()
    with Environment(device_patches(Facts(), "auto", report), report):
        ruled = {"torch.zeros(3)": torch.zeros, "torch.zeros_like(x)": torch.zeros_like}
        rows = []
        for name, (function, argument) in plain.items():
            sides = [function, _empty(function), ruled[name]]
            bare, empty, ours = _least(sides, argument, options.repeats)
            rows.append(harness.Row(f"{name}, rules", ours, bare, "us", 1.05, "beside torch's own"))
            rows.append(harness.Row(f"{name}, an empty wrapper", empty, bare, "us", None, "beside torch's own"))
    harness.write("device_wrapper", rows, options.out)


def _empty(function: Callable[..., object]) -> Callable[..., object]:
    def wrapper(*args: object, **kwargs: object) -> object:
        return function(*args, **kwargs)

    return wrapper


def _least(sides: list[Callable[..., object]], argument: object, repeats: int) -> list[float]:
    """The least time of a call of each side, in microseconds."""
    least = [float("inf")] * len(sides)
    for _ in range(repeats):
        for number, side in enumerate(sides):
            start = time.perf_counter()
            for _ in range(CALLS):
                side(argument)
            least[number] = min(least[number], (time.perf_counter() - start) / CALLS * 1e6)
    return least


if __name__ == "__main__":
    main()
