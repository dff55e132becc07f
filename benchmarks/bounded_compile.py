"""The bounded compile beside plain torch.compile and eager: first step, compile time by depth, steady state, memory.

A Llama-style decoder. Every figure is taken in a process of its own with an empty cache. Compile times are wall time: of the
child for ours (without its start, which is said beside it), of the first call for torch.compile (without its imports).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import _harness as harness

CHILD = """
import json, os, sys, time
import torch
from torch import nn
import torch.nn.functional as F

side, num_blocks, dim = os.environ["SIDE"], int(os.environ["BLOCKS"]), int(os.environ["DIM"])
training = os.environ["MODE"] == "training"

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.gate, self.up = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, 3 * dim, bias=False)
        self.down = nn.Linear(3 * dim, dim, bias=False)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, 4, dim // 4).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, dim))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(256, dim)
        self.parts = nn.ModuleList(Block() for _ in range(num_blocks))
        self.head = nn.Linear(dim, 256, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for part in self.parts:
            x = part(x)
        return self.head(x)

torch.manual_seed(0)
model, tokens = Decoder(), torch.randint(0, 256, (2, 64))

def step():
    if training:
        model_now(tokens).float().square().mean().backward()
    else:
        with torch.no_grad():
            model_now(tokens)

def best(repeats=5, calls=10):
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        for _ in range(calls):
            step()
        times.append((time.perf_counter() - begun) / calls)
    return min(times)

figures, model_now = {}, model
if side == "eager":
    begun = time.perf_counter(); step(); figures["first_step_s"] = time.perf_counter() - begun
    figures["steady_s"] = best()
elif side == "torch":
    import torch._dynamo, torch._inductor.compile_fx
    model_now = torch.compile(model, dynamic=False)
    begun = time.perf_counter(); step(); figures["compile_s"] = time.perf_counter() - begun
    figures["steady_s"] = best()
else:
    from torchspan.strategies import Budget, Job, compile_bounded, run_bounded
    from torchspan.strategies._transport import dumps
    strategy, handback = side.split("+")
    if os.environ.get("WARM") == "1":
        begun = time.perf_counter()
        run_bounded(Job("torchspan.strategies._worker:call_function", dumps((abs, (1,)))), Budget(600))
        figures["start_s"] = time.perf_counter() - begun
    model_now = compile_bounded(model, strategy=strategy, handback=handback, budget=Budget(600))
    begun = time.perf_counter(); step(); figures["first_step_s"] = time.perf_counter() - begun
    report, slowest = model_now.report, 0.0
    while "swap_stall_s" not in report.figures:
        begun = time.perf_counter(); step(); slowest = max(slowest, time.perf_counter() - begun)
        time.sleep(0.1)
        assert not [a for a in report.attempts if a.outcome != "compiled"], report.attempts
    for _ in range(3):
        step()
    figures["compile_s"] = sum(a.seconds for a in report.attempts)
    figures["peak_bytes"] = max(a.peak_bytes or 0 for a in report.attempts)
    figures["slowest_step_s"] = slowest
    figures |= report.figures
    figures["steady_s"] = best()
print(json.dumps(figures), flush=True)
"""


def run(side: str, blocks: int, dim: int, mode: str, warm: bool = False) -> dict[str, Any]:
    """One side's figures, in a fresh process with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        environ = {**os.environ, "SIDE": side, "BLOCKS": str(blocks), "DIM": str(dim), "MODE": mode, "WARM": str(int(warm))}
        environ |= {"TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", CHILD], env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} with {blocks} blocks failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    """Measure and write."""
    options = harness.arguments(__doc__ or "", blocks=32, few=4, dim=128, mode="training")
    few, many = ({} for _ in range(2))
    for side, warm in (("eager", False), ("torch", False), ("per_block+caches", True), ("whole+artifact", True)):
        few[side] = run(side, options.few, options.dim, options.mode, warm)
        if side != "whole+artifact":
            many[side] = run(side, options.blocks, options.dim, options.mode, warm)
    cold = run("whole+artifact", options.few, options.dim, options.mode)
    block, whole = many["per_block+caches"], few["whole+artifact"]
    peak, start = f"{block['peak_bytes'] / 2**20:.0f} MiB", f"{block['start_s']:.1f} s"
    note = f"{options.mode}, dim {options.dim}; peak of the child {peak}; its start {start}"
    slow = f"slowest eager step while it compiled {block['slowest_step_s']:.3f} s"
    rows = [
        harness.Row("first step over eager's", cold["first_step_s"], few["eager"]["first_step_s"], goal=1.10, note=slow),
        harness.Row(
            f"per block: compile of {options.blocks} over {options.few} blocks",
            many["per_block+caches"]["compile_s"],
            few["per_block+caches"]["compile_s"],
            goal=1.3,
            note=note,
        ),
        harness.Row(
            f"torch.compile, whole: {options.blocks} over {options.few} blocks",
            many["torch"]["compile_s"],
            few["torch"]["compile_s"],
        ),
        harness.Row(
            "steady step, per block, over torch.compile's",
            many["per_block+caches"]["steady_s"],
            many["torch"]["steady_s"],
            goal=1.02,
        ),
        harness.Row(
            "steady step, whole from an artifact, over torch.compile's",
            whole["steady_s"],
            few["torch"]["steady_s"],
            goal=1.02,
        ),
        harness.Row(
            "stall at the swap, artifact over caches",
            whole["swap_stall_s"],
            few["per_block+caches"]["swap_stall_s"],
        ),
    ]
    harness.write("bounded_compile", rows, options.out)


if __name__ == "__main__":
    main()
