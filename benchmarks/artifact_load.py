"""Load and first call of an artifact over a cold and a warm torch.compile, and over eager's first call, in fresh processes.

A small transformer, inference and training. Every time is wall time from the end of `import torch` to the first result (in
training: the first gradients), so imports that a way needs (dynamo, inductor) count for it.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from pathlib import Path

import _harness as harness

MODEL = """
import os, sys, time
import torch
from torch import nn
import torch.nn.functional as F

class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        batch, length, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, 4, dim // 4).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, dim))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

class Transformer(nn.Module):
    def __init__(self, num_blocks=2, dim=64, vocabulary=256):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(num_blocks))
        self.head = nn.Linear(dim, vocabulary)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

torch.manual_seed(0)
model = Transformer()
tokens = torch.randint(0, 256, (2, 32))
training = os.environ["MODE"] == "training"
torch.set_grad_enabled(training)

def first_step(function):
    result = function(tokens)
    if training:
        result.float().mean().backward()

def steady(function):
    times = []
    for _ in range(60):
        start = time.perf_counter()
        first_step(function)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
"""

MAKE = "from torchspan.artifacts import precompile\nprecompile(model, (tokens,)).save(os.environ['ARTIFACT'])\nprint(0)"
LOAD = "from torchspan.artifacts import load\nfunction = load(os.environ['ARTIFACT'], model)"
COMPILE = "function = torch.compile(model, dynamic=False)"
EAGER = "function = model"


def timed(prepare: str) -> str:
    """A program that prints the seconds of `prepare` and of the first step."""
    return f"{MODEL}\nstart = time.perf_counter()\n{prepare}\nfirst_step(function)\nprint(time.perf_counter() - start)"


def settled(prepare: str) -> str:
    """A program that prints the median seconds of a step, once it has run some."""
    return f"{MODEL}\n{prepare}\nsteady(function)\nprint(steady(function))"


def measure(mode: str, repeats: int, folder: Path) -> list[harness.Row]:
    """The rows of one mode; every side of one comparison is measured in turn."""
    caches = folder / mode
    env = {"MODE": mode, "ARTIFACT": str(folder / f"{mode}.tspan"), "TORCHINDUCTOR_CACHE_DIR": str(caches / "warm")}
    harness.fresh_process(f"{MODEL}\n{MAKE}", env)
    harness.fresh_process(timed(COMPILE), env)  # fills the caches

    def cold() -> float:
        shutil.rmtree(caches / "cold", ignore_errors=True)
        return harness.fresh_process(timed(COMPILE), env | {"TORCHINDUCTOR_CACHE_DIR": str(caches / "cold")})

    def load() -> float:
        return harness.fresh_process(timed(LOAD), env | {"PATH": ""})

    sides = [
        (load(), cold(), harness.fresh_process(timed(COMPILE), env), harness.fresh_process(timed(EAGER), env))
        for _ in range(repeats)
    ]
    loaded, from_cold, from_warm, eager = (statistics.median(side) for side in zip(*sides, strict=True))
    ours, theirs = harness.in_turn(
        lambda: harness.fresh_process(settled(LOAD), env), lambda: harness.fresh_process(settled(COMPILE), env), repeats
    )
    return [
        harness.Row(f"{mode}: load + first step over cold torch.compile", loaded, from_cold, goal=1 / 20),
        harness.Row(f"{mode}: load + first step over warm torch.compile", loaded, from_warm, goal=1 / 5),
        harness.Row(f"{mode}: load + first step over eager's first step", loaded, eager, goal=2),
        harness.Row(f"{mode}: a later step over torch.compile's", ours, theirs, goal=1.02),
    ]


def main() -> None:
    """Measure and write."""
    options = harness.arguments(__doc__, repeats=3)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for mode in ("inference", "training") for row in measure(mode, options.repeats, Path(folder))]
    harness.write("artifact_load", rows, options.out)


if __name__ == "__main__":
    main()
