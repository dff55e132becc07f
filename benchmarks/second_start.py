"""The same program started twice: how long its first calls take until one has taken over compiled code, and how many they are.

    python benchmarks/second_start.py --out benchmarks/results/second_start.json

The first start compiles, the second one loads what the first left in the cache folder. Seconds are those from the first call
on: importing torch and making the model come before that on both sides.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from _harness import Row, arguments, fresh_script, write

LIMIT_S = 600.0


def main() -> None:
    """Start the program twice in each mode, and write the rows."""
    options = arguments(__doc__ or "", blocks=8, dim=256)
    rows = []
    for mode in ("training", "serving"):
        with tempfile.TemporaryDirectory() as folder:
            starts = [
                fresh_script(Path(__file__), [mode, str(options.blocks), str(options.dim)], {"TORCHINDUCTOR_CACHE_DIR": folder})
                for _ in range(2)
            ]
        first, second = starts
        note = f"{first['outcome']} after {first['calls']} calls, then {second['outcome']} after {second['calls']}"
        rows.append(Row(f"{mode}: to the swap, second start over first", second["seconds"], first["seconds"], "s", 0.1, note))
        rows.append(Row(f"{mode}: calls of the second start, over three", second["calls"], 3, "calls", 1.0))
    write("second_start", rows, options.out, job=f"a transformer of {options.blocks} layers, {options.dim} wide")


def start(mode: str, num_blocks: int, dim: int) -> None:
    """One start of the program: print what it took until a call took compiled code over."""
    import torch
    from torch import nn

    import torchspan

    torch.manual_seed(0)
    torch.set_num_threads(1)
    layer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, dropout=0.0, batch_first=True)
    model = torchspan.compile(nn.TransformerEncoder(layer, num_blocks, enable_nested_tensor=False))
    x = torch.randn(2, 64, dim)
    calls, began = 0, time.perf_counter()
    while "swap_stall_s" not in model.report.figures and time.perf_counter() - began < LIMIT_S:
        with torch.set_grad_enabled(mode == "training"):
            outputs = model(x)
        if mode == "training":
            outputs.square().mean().backward()
        calls += 1
        time.sleep(0 if calls < 5 else 0.02)
    outcome = model.report.attempts[-1].outcome if model.report.attempts else "nothing"
    print(json.dumps({"seconds": time.perf_counter() - began, "calls": calls, "outcome": outcome}))


if __name__ == "__main__":
    if len(sys.argv) > 3 and sys.argv[1] in ("training", "serving"):
        start(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
