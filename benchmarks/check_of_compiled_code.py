"""What the check of compiled code against eager costs a training step: memory at its peak, and seconds.

    python benchmarks/check_of_compiled_code.py --out benchmarks/results/check_of_compiled_code.json

A stack of linear layers, the whole in eager: the check runs the program twice and compares, whatever the compiled code is, so
eager stands for that too, with numbers that differ in their last bits, as those of compiled code do. Each side is a process of
its own; the bytes are those that it held beyond what it had before.
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path

import torch
from _harness import Row, arguments, fresh_process, write
from torch import nn

from torchspan.regions import verify

WIDTH = 4096


def main() -> None:
    """Measure both sides in turn, show and write them."""
    options = arguments(__doc__ or "", mib=256, layers=16, repeats=3)
    rows = []
    for kind, unit, goal in (("bytes", "B", 1.2), ("seconds", "s", 5.0)):
        measured = [(_of("check", kind, options), _of("step", kind, options)) for _ in range(options.repeats)]
        ours, theirs = (sorted(side)[len(side) // 2] for side in zip(*measured, strict=True))
        ratios = sorted(a / b for a, b in measured)
        name = f"the check over an eager training step, {options.mib} MiB of weights: {kind}"
        rows.append(Row(name, ours, theirs, unit, goal, spread=(ratios[0], ratios[-1])))
    write("check_of_compiled_code", rows, options.out)


def _of(side: str, kind: str, options: object) -> float:
    folder = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {folder!r}); import check_of_compiled_code as own; own.measure({side!r}, {kind!r}, {options.mib}, {options.layers})"  # type: ignore[attr-defined]  # noqa: E501
    return fresh_process(code)


def measure(side: str, kind: str, mib: int, layers: int) -> None:
    """Print what one side takes."""
    torch.set_num_threads(1)
    width = int((mib * 2**20 / 4 / layers) ** 0.5)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    x = torch.randn(8, width)
    model(x[:1])

    def step() -> None:
        model(x).square().mean().backward()
        model.zero_grad()

    def check() -> None:
        wrong = verify.mismatch(
            lambda target, x: target(x), lambda target, x: target(x * (1 + 2**-20)), (model, (x,), {}), is_random=False
        )
        assert wrong is None, wrong

    run = step if side == "step" else check
    gc.collect()
    if kind == "seconds":
        run()
        started = time.perf_counter()
        run()
        print(time.perf_counter() - started)
        return
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    print(_status("VmHWM") - before)


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
