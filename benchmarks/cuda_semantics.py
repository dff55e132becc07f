"""What following every operator costs: the mode ``cuda-semantics`` over the default mode, both in turn in one process."""

from __future__ import annotations

import time
from collections.abc import Callable

import _harness as harness
import torch

from torchspan.core.report import Report
from torchspan.devices._base import device_patches
from torchspan.environment.facts import Facts
from torchspan.environment.scope import Environment


def _calls() -> dict[str, tuple[int, Callable[[], object]]]:
    """What is measured, and how often it is called at a time; made anew in each mode."""
    small, large = torch.ones(3, device="cuda"), torch.ones(512, 512, device="cuda")
    model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 256)).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.ones(64, 256, device="cuda")

    def step() -> None:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return {
        "x + y, 3 numbers": (1000, lambda: small + small),
        "x.view(-1)": (1000, lambda: small.view(-1)),
        "torch.randn(3, device='cuda')": (500, lambda: torch.randn(3, device="cuda")),
        "x @ y, 512 by 512": (20, lambda: large @ large),
        "a training step, AdamW, 64 x 256": (10, step),
    }


def _microseconds(mode: str) -> dict[str, float]:
    with Environment(device_patches(Facts(), mode, Report())):
        return {name: _of(calls, call) for name, (calls, call) in _calls().items()}


def _of(calls: int, call: Callable[[], object]) -> float:
    call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls * 1e6


def main() -> None:
    """Measure and write."""
    options = harness.arguments(__doc__ or "", repeats=9)
    torch.set_num_threads(1)  # other work on the machine would show in the time that threads wait for each other
    pairs = [(_microseconds("cuda-semantics"), _microseconds("auto")) for _ in range(options.repeats)]
    rows = [_row(name, [(ours[name], theirs[name]) for ours, theirs in pairs]) for name in pairs[0][0]]
    harness.write("cuda_semantics", rows, options.out)


def _row(name: str, pairs: list[tuple[float, float]]) -> harness.Row:
    """Each side's fastest run: what else the machine does only ever adds."""
    ours, theirs = (min(side) for side in zip(*pairs))
    return harness.Row(name, ours, theirs, "us", None, f"{ours - theirs:+.1f} us")


if __name__ == "__main__":
    main()
