"""The bounded compile beside plain torch.compile and eager: first step, compile time by depth, steady state, limits.

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
model, tokens = Decoder(), torch.randint(0, 256, (2, 128))

def step(model_now):
    if training:
        model_now(tokens).float().square().mean().backward()
    else:
        with torch.no_grad():
            model_now(tokens)

def timed(model_now):
    begun = time.perf_counter()
    step(model_now)
    return time.perf_counter() - begun

def steady(one, other, repeats=25):
    # both sides in turn, in one process: the medians
    pairs = [(timed(one), timed(other)) for _ in range(repeats)]
    return [sorted(times)[repeats // 2] for times in zip(*pairs)]

figures = {}
if side == "eager":
    figures["first_step_s"] = timed(model)
elif side == "torch":
    import torch._dynamo, torch._inductor.compile_fx
    figures["compile_s"] = timed(torch.compile(model, dynamic=False))
else:
    from torchspan.strategies import compile_bounded
    from torchspan.jobs.budget import Budget
    from torchspan.jobs.supervisor import Job, run_bounded
    from torchspan.jobs.transport import dumps
    strategy, handback = side.split("+")
    if os.environ["WARM"] == "1":
        begun = time.perf_counter()
        run_bounded(Job("torchspan.regions.worker:call_function", dumps((abs, (1,)))), Budget(600))
        figures["start_s"] = time.perf_counter() - begun
    begun = time.perf_counter()
    bounded = compile_bounded(model, strategy=strategy, handback=handback, budget=Budget(600))
    step(bounded)
    figures["first_step_s"] = time.perf_counter() - begun
    report, slowest = bounded.report, 0.0
    while os.environ["WARM"] == "1" and "swap_stall_s" not in report.figures:
        slowest = max(slowest, timed(bounded))
        time.sleep(0.1)
        assert not [a for a in report.attempts if a.outcome != "compiled"], report.attempts
    if os.environ["WARM"] == "1":
        figures["compile_s"] = sum(a.seconds for a in report.attempts)
        figures["peak_bytes"] = max(a.peak_bytes or 0 for a in report.attempts)
        figures["slowest_step_s"] = slowest
        figures |= report.figures
        for _ in range(3):
            step(bounded)
        plain = Decoder()
        if strategy == "per_block":  # the same parts
            for part in plain.parts:
                part.compile(dynamic=False)
        else:
            plain = torch.compile(plain, dynamic=False)
        step(plain)
        figures["steady_s"], figures["steady_of_torch_s"] = steady(bounded, plain)
print(json.dumps(figures), flush=True)
"""


LIMITS = """
import ctypes, json, time
import torch
from torchspan.strategies import compile_bounded
from torchspan.jobs.budget import Budget
from torchspan.jobs.supervisor import Job, end_servers, run_bounded
from torchspan.jobs.transport import dumps

def sleeps(graph, inputs):
    time.sleep(1000)

def spins_with_the_gil(graph, inputs):
    ctypes.PyDLL(None).sleep(1000)

def waits_for_a_tool(graph, inputs):
    import subprocess
    subprocess.run(["sleep", "1000"])

def allocates(graph, inputs):
    pages = []
    while True:
        pages.append(b"1" * (1 << 24))

run_bounded(Job("torchspan.regions.worker:call_function", dumps((abs, (1,)))), Budget(600))

def ended(backend, **budget):
    model = compile_bounded(torch.nn.Linear(4, 4), strategy="whole", backend=backend, wait=True, budget=Budget(**budget))
    model(torch.ones(2, 4))
    (attempt,) = model.report.attempts
    return attempt

timeouts = [ended(one, seconds=3) for one in (sleeps, spins_with_the_gil, waits_for_a_tool)]
assert {one.outcome for one in timeouts} == {"timeout"}, timeouts
eaten = ended(allocates, seconds=60, memory="2GiB")
assert eaten.outcome == "memory", eaten
end_servers()
print(json.dumps({"seconds": max(one.seconds for one in timeouts), "bytes": eaten.peak_bytes}))
"""

WEIGHTS = """
import json, os, psutil
import torch
from torchspan.strategies import compile_bounded
from torchspan.jobs.budget import Budget
from torchspan.jobs.supervisor import end_servers

rows = int(os.environ["ROWS"])
model = torch.nn.Sequential(torch.nn.Embedding(rows, 1024), torch.nn.Linear(1024, 16))
tokens = torch.randint(0, 256, (4, 16))
bounded = compile_bounded(model, strategy="whole", wait=True, budget=Budget(600))
with torch.no_grad():
    model(tokens)
    before = psutil.Process().memory_info().rss
    bounded(tokens)
(attempt,) = bounded.report.attempts
assert attempt.outcome == "compiled", attempt
after = psutil.Process().memory_info().rss
end_servers()
print(json.dumps({"child": attempt.peak_bytes, "pair": attempt.peak_bytes + after - before}))
"""


def run_code(code: str, **environ: str) -> dict[str, Any]:
    """What `code` prints, run in a fresh process with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        own = {"TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1", **environ}
        process = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **own}, capture_output=True, text=True, check=False
        )
    if process.returncode:
        raise SystemExit(f"{environ} failed:\n{process.stderr[-3000:]}")
    return dict(json.loads(process.stdout.strip().splitlines()[-1]))


def main() -> None:
    """Measure and write."""
    options = harness.arguments(__doc__ or "", blocks=32, few=4, dim=256, mode="training")

    def run(side: str, blocks: int, *, warm: bool = False, mode: str = options.mode) -> dict[str, Any]:
        sizes = {"BLOCKS": str(blocks), "DIM": str(options.dim), "MODE": mode}
        return run_code(CHILD, SIDE=side, WARM=str(int(warm)), **sizes)

    few_plain, many_plain = run("torch", options.few), run("torch", options.blocks)
    few, many = run("per_block+caches", options.few, warm=True), run("per_block+caches", options.blocks, warm=True)
    whole, forward = run("whole+auto", options.few, warm=True), run("whole+auto", options.few, warm=True, mode="forward")
    first, first_eager = run("per_block+caches", options.blocks), run("eager", options.blocks)
    limits, light, heavy = run_code(LIMITS), run_code(WEIGHTS, ROWS="256"), run_code(WEIGHTS, ROWS=str(2**18))
    deep, shallow = f"{options.blocks} blocks", f"{options.blocks} over {options.few} blocks"
    peak, start = f"{many['peak_bytes'] / 2**20:.0f} MiB", f"{many['start_s']:.1f} s"
    note = f"{options.mode}, dim {options.dim}; peak of the child {peak}; its start {start}"
    slow = f"{deep}; slowest eager step while it compiled {many['slowest_step_s']:.3f} s"
    rows = [
        harness.Row("first step over eager's", first["first_step_s"], first_eager["first_step_s"], goal=1.10, note=slow),
        harness.Row(f"per block: compile of {shallow}", many["compile_s"], few["compile_s"], goal=1.3, note=note),
        harness.Row(f"torch.compile, whole: {shallow}", many_plain["compile_s"], few_plain["compile_s"]),
        _steady(f"per block, {deep}, {options.mode}", many),
        _steady(f"whole, {options.few} blocks, {options.mode}", whole),
        _steady(f"whole, {options.few} blocks, forward (from an artifact)", forward),
        harness.Row("stall at the swap, from an artifact over from caches", forward["swap_stall_s"], whole["swap_stall_s"]),
        harness.Row("ended after, over a budget of 3 s", limits["seconds"], 3.0, goal=4 / 3, note="worst of 3 that hang"),
        harness.Row("most memory over a limit of 2 GiB", limits["bytes"], 2 * 2**30, unit="B", goal=1.05),
        harness.Row(
            "extra memory of both processes, 1 GiB of weights over 1 MiB", heavy["pair"], light["pair"], unit="B", goal=1.1
        ),
    ]
    harness.write("bounded_compile", rows, options.out)


def _steady(what: str, figures: dict[str, Any]) -> harness.Row:
    name = f"steady step, {what}, over torch.compile's"
    return harness.Row(name, figures["steady_s"], figures["steady_of_torch_s"], goal=1.02)


if __name__ == "__main__":
    main()
