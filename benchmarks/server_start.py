"""What the compile server takes until it is ready, beside what every process takes that compiles: CPU seconds and memory.

    python benchmarks/server_start.py --out benchmarks/results/server_start.json

The server imports torch and its compilers once, and forks a worker for each job. Beside it stand a plain interpreter that
imports the same three modules of torch, which is the least that a compile can do with, and one that has compiled a linear layer
by torch.compile. Each side is a fresh process; CPU seconds are of that process alone, bytes are those that it holds at the end.
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path

from _harness import Row, arguments, fresh_script, write

from torchspan.jobs.servers import PRELOAD

SIDES = ("server", "imports", "torch_compile")


def main() -> None:
    """Measure the sides in turn, show and write them."""
    options = arguments(__doc__ or "", repeats=5, side="")
    if options.side:
        print(list(measure(options.side)))
        return
    runs = [{side: fresh_script(Path(__file__), ["--side", side]) for side in SIDES} for _ in range(options.repeats)]
    names = {"imports": f"the same imports of torch: {', '.join(PRELOAD)}", "torch_compile": "torch.compile of a linear layer"}
    rows = []
    for place, (what, unit) in enumerate((("CPU until it is ready", "s"), ("memory", "B"))):
        for side, name in names.items():
            ours, theirs = (statistics.median(run[which][place] for run in runs) for which in ("server", side))
            ratios = sorted(run["server"][place] / run[side][place] for run in runs)
            rows.append(Row(f"the server over {name}: {what}", ours, theirs, unit, spread=(ratios[0], ratios[-1])))
    write("server_start", rows, options.out)


def measure(side: str) -> tuple[float, int]:
    """CPU seconds and bytes of one side."""
    if side == "server":
        return _server()
    if side == "imports":
        for name in PRELOAD:
            __import__(name)
    else:
        import torch

        torch.compile(torch.nn.Linear(4, 4))(torch.ones(1, 4))
    return _of(os.getpid())


def _server() -> tuple[float, int]:
    from torchspan.jobs.budget import Budget
    from torchspan.jobs.supervisor import Job, run_bounded, server_pids

    ending = run_bounded(
        Job("torchspan.regions.worker:profile_region", b""), Budget(300)
    )  # a job that ends at once: it is empty
    assert ending.seconds < 300, ending
    (pid,) = server_pids()
    return _of(pid)


def _of(pid: int) -> tuple[float, int]:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return cpu_s, next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))


if __name__ == "__main__":
    sys.exit(main())
