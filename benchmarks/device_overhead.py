"""What the device rules add to a call: one that names no device, one that names a device that is not here, a training step.

Each figure is a median of ratios over torch without the rules, both sides taken in turn in one process: the rules come and go.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import _harness as harness
import torch

from torchspan.core.report import Report
from torchspan.devices._base import device_patches
from torchspan.environment.facts import Facts
from torchspan.environment.scope import Environment

x, weight = torch.randn(64, 64), torch.randn(64, 64)
small = torch.ones(3)
CPU = torch.device("cpu")
layer = torch.nn.Linear(64, 64)

# A function of a device where it names one. What is looked up (torch.zeros) is looked up at each call, as in a program.
PLAIN: dict[str, Callable[[], object]] = {
    "x + y": lambda: x + weight,
    "x @ y": lambda: x @ weight,
    "Linear(x)": lambda: layer(x),
    "torch.zeros(3)": lambda: torch.zeros(3),
    "torch.randn(64, 64)": lambda: torch.randn(64, 64),
    "torch.zeros_like(x)": lambda: torch.zeros_like(x),
    "x.to(torch.float64)": lambda: x.to(torch.float64),
}
NAMED: dict[str, Callable[[str], object]] = {
    "torch.zeros(3, device=…)": lambda device: torch.zeros(3, device=device),
    "torch.arange(3, device=…)": lambda device: torch.arange(3, device=device),
    "torch.tensor([1.], device=…)": lambda device: torch.tensor([1.0], device=device),
    "x.to(…, copy=True)": lambda device: small.to(device, copy=True),
    "x.cuda().cpu(), two copies": lambda device: small.cuda().cpu() if device == "cuda" else _two_copies(),
}


def _two_copies() -> torch.Tensor:
    return small.to(CPU, copy=True).to(CPU, copy=True)


def main() -> None:
    """Measure and write."""
    options = harness.arguments(__doc__ or "", repeats=41, calls=3000)
    torch.set_num_threads(1)  # other work on the machine would show in the time that threads wait for each other
    report = Report()
    rules = Environment(device_patches(Facts(), "auto", report), report)
    rows = [_plain(name, call, rules, options) for name, call in PLAIN.items()]
    rows += [_named(name, call, rules, options) for name, call in NAMED.items()]
    rows.append(_training_step(rules, options.repeats))
    nothing = Environment(device_patches(Facts(num_cuda=1)))
    rows.append(
        _compare("torch.zeros(3) where CUDA is here", PLAIN["torch.zeros(3)"], PLAIN["torch.zeros(3)"], nothing, options, 1.02)
    )
    harness.write("device_overhead", rows, options.out)


def _plain(name: str, call: Callable[[], object], rules: Environment, options: object) -> harness.Row:
    return _compare(name, call, call, rules, options, 1.02, "names no device")


def _named(name: str, call: Callable[[str], object], rules: Environment, options: object) -> harness.Row:
    row = _compare(name, lambda: call("cuda"), lambda: call("cpu"), rules, options, None)
    return harness.Row(row.name, row.ours, row.theirs, row.unit, None, f"{row.ours - row.theirs:+.2f} us; goal at most +2 us")


def _compare(
    name: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    rules: Environment,
    options: object,
    goal: float | None,
    note: str = "",
) -> harness.Row:
    """One row in microseconds a call, `ours` with the rules in force and `theirs` without."""
    calls, repeats = options.calls, options.repeats  # type: ignore[attr-defined]
    pairs = []
    for _ in range(repeats):
        with rules:
            with_rules = _microseconds(ours, calls)
        pairs.append((with_rules, _microseconds(theirs, calls)))
    plain = statistics.median(theirs for _, theirs in pairs)
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    return harness.Row(name, plain * ratio, plain, "us", goal, note)


def _microseconds(call: Callable[[], object], calls: int) -> float:
    call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls * 1e6


def _training_step(rules: Environment, repeats: int) -> harness.Row:
    """A step of a small network that says where its data goes."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randn(32, 64)

    def step(device: str) -> None:
        moved = batch.to(device, copy=True)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = (model(moved) - torch.zeros(32, 64, device=device)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    pairs = []
    for _ in range(repeats):
        with rules:
            ours = _microseconds(lambda: step("cuda"), 20)
        pairs.append((ours, _microseconds(lambda: step("cpu"), 20)))
    plain = statistics.median(theirs for _, theirs in pairs)
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    return harness.Row("a training step", plain * ratio, plain, "us", 1.01)


if __name__ == "__main__":
    main()
