"""One call of a tiny compiled model over the same call under plain torch.compile: what stands around the compiled code.

    python benchmarks/call_overhead.py --out benchmarks/results/call_overhead.json

All sides take turns in one process, with one thread. A figure is the lowest of several averages of CPU time: a busy machine
adds to a call, and never takes away.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from _harness import Row, arguments, write
from torch import nn

import torchspan

NUM_TENSORS = 65


class Summed(nn.Module):
    """Takes many tensors."""

    def forward(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Their sum."""
        return torch.stack(tensors).sum(0)


def main() -> None:
    """Measure each kind of call, and write the rows."""
    options = arguments(__doc__ or "", calls=2000, repeats=9)
    torch.set_num_threads(1)
    layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    x, many = torch.randn(4, 8), [torch.randn(4) for _ in range(NUM_TENSORS)]
    kinds: dict[str, tuple[nn.Module, tuple[Any, ...], bool, str]] = {
        "without gradients, from an artifact": (layers, (x,), False, "auto"),
        "without gradients, from caches": (layers, (x,), False, "caches"),
        "training step": (layers, (x,), True, "auto"),
        f"without gradients, {NUM_TENSORS} tensors": (Summed(), (many,), False, "auto"),
    }
    rows = []
    for name, (model, inputs, is_training, handback) in kinds.items():
        sides = {
            "eager": model,
            "torch.compile": torch.compile(model),
            "ours": torchspan.compile(model, handback=handback),  # type: ignore[arg-type]
        }
        calls = {side: _call(program, inputs, is_training) for side, program in sides.items()}
        calls["torch.compile"]()
        _until_swapped(sides["ours"], calls["ours"])
        seconds = _taken(calls, options.calls, options.repeats)
        note = f"eager {seconds['eager'] * 1e6:.1f} µs"
        rows.append(Row(f"a call, {name}", seconds["ours"], seconds["torch.compile"], "s", 1.1, note))
    write("call_overhead", rows, options.out)


def _call(program: Any, inputs: tuple[Any, ...], is_training: bool) -> Callable[[], object]:
    def train() -> None:
        program(*inputs).sum().backward()

    def serve() -> None:
        with torch.no_grad():
            program(*inputs)

    return train if is_training else serve


def _until_swapped(program: Any, call: Callable[[], object]) -> None:
    until = time.monotonic() + 300
    while "swap_stall_s" not in program.report.figures:
        assert time.monotonic() < until, program.report
        call()
        time.sleep(0.05)


def _taken(calls: dict[str, Callable[[], object]], number: int, repeats: int) -> dict[str, float]:
    """CPU seconds of one call of each side, the lowest of the averages."""
    lowest = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for side, call in calls.items():
            start = time.process_time()
            for _ in range(number):
                call()
            lowest[side] = min(lowest[side], (time.process_time() - start) / number)
    return lowest


if __name__ == "__main__":
    main()
