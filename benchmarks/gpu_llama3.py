"""Llama 3 on one GPU: tokens a second, use of its FLOPs (MFU) and peak memory: eager, by torch.compile, as a captured graph.

Forward and backward of one model in bfloat16, all sides in turn in one run. Without a GPU it says so and measures nothing;
``--device cpu --config tiny --seq-len 64`` only shows that it works.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _harness import Row, arguments, write
from torch import Tensor

from torchspan.capture._choose import capture_training
from torchspan.capture._state import BoundGraph
from torchspan.core.program import Program
from torchspan.core.report import Report
from torchspan.models._base import get_model
from torchspan.passes._base import PassContext
from torchspan.passes._pipeline import Pipeline
from torchspan.train.config import Compile
from torchspan.train.job import Loss
from torchspan.train.loop import bounded

# dense bfloat16, without sparsity, as the data sheets of the SXM (B200: HGX) variants say
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}

Step = Callable[[], object]


@dataclass(frozen=True)
class Side:
    """What was measured of one side; `mfu` and `peak_bytes` are None where the device does not tell."""

    seconds: float
    tokens_per_s: float
    mfu: float | None
    peak_bytes: int | None


def main() -> None:
    """Measure every side and write them."""
    options = arguments(
        __doc__ or "", device="cuda", config="1B", batch=1, seq_len=4096, repeats=10, passes="", skip_compile=False
    )
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA GPU is here: nothing is measured")
        return
    config = get_model("llama3").flavour(options.config)
    program, inputs = _program(config, options)
    report = Report()
    steps: dict[str, Step] = {"eager": _backward_of(program, program, inputs)}
    if not options.skip_compile:
        steps["torch.compile"] = _backward_of(torch.compile(program), program, inputs)
    steps["graph"] = _graph(program, inputs, options.passes, report)
    num_tokens = options.batch * options.seq_len
    flops = flops_per_token(config, options.seq_len) * num_tokens
    sides = _measure(steps, program, options, num_tokens, flops)
    for name, side in sides.items():
        mfu = "unknown" if side.mfu is None else f"{side.mfu:.1%}"
        print(f"{name}: {side.tokens_per_s:,.0f} tokens/s, MFU {mfu}")
    what = {"config": options.config, "batch": options.batch, "seq_len": options.seq_len, "passes": options.passes}
    write("Llama 3 on one GPU", _rows(sides), options.out, device=_device_name(options.device), **what, sides=_plain(sides))


def flops_per_token(config: Any, seq_len: int) -> float:
    """Floating-point operations of forward and backward a token: six a weight that multiplies, and those of causal attention.

    The embedding's table multiplies nothing. Causal attention sees half of the sequence, on average.
    """
    width = config.num_heads * config.head_dim
    attention = 2 * config.dim * width + 2 * config.dim * config.num_kv_heads * config.head_dim
    weights = config.num_layers * (attention + 3 * config.dim * config.hidden_dim) + config.dim * config.vocab_size
    return 6.0 * weights + 6.0 * config.num_layers * width * seq_len


def _program(config: Any, options: Any) -> tuple[Loss, tuple[Tensor, Tensor]]:
    """The model with its loss, in bfloat16 on the device, and tokens and labels (B, S)."""
    with torch.device(options.device):
        model = get_model("llama3").build(config)
        generator = torch.Generator(options.device).manual_seed(0)
        shape = (options.batch, options.seq_len + 1)
        window_BS = torch.randint(config.vocab_size, shape, generator=generator)
    program = Loss(model.to(torch.bfloat16), options.batch * options.seq_len)
    return program, (window_BS[:, :-1].contiguous(), window_BS[:, 1:].contiguous())


def _backward_of(function: Callable[..., Any], program: Loss, inputs: tuple[Tensor, Tensor]) -> Step:
    def step() -> None:
        program.zero_grad(set_to_none=True)
        function(*inputs).backward()

    return step


def _graph(program: Loss, inputs: tuple[Tensor, Tensor], passes: str, report: Report) -> Step:
    """The captured step, after `passes`."""
    graph = capture_training(Program(program, inputs), report=report)
    graph = Pipeline.parse(passes).run(graph, PassContext(report, bounded(Compile(), report)))
    bound = BoundGraph(graph, program)

    def step() -> None:
        program.zero_grad(set_to_none=True)
        bound(*inputs)

    return step


def _measure(steps: dict[str, Step], program: Loss, options: Any, num_tokens: int, flops: float) -> dict[str, Side]:
    """Each side, in turn: once to warm up, once for its memory, then for the clock."""
    peak_flops = next((peak for name, peak in PEAK_FLOPS.items() if name in _device_name(options.device)), None)
    for step in steps.values():
        step()
    peaks = {name: _peak_bytes(step, program, options.device) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.repeats):
        for name, step in steps.items():
            seconds[name].append(_seconds(step, options.device))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        name: Side(median, num_tokens / median, flops / median / peak_flops if peak_flops else None, peaks[name])
        for name, median in medians.items()
    }


def _rows(sides: dict[str, Side]) -> list[Row]:
    """The graph against every other side."""
    graph, rows = sides["graph"], []
    for name, side in sides.items():
        if name == "graph":
            continue
        rows.append(Row(f"one step: graph / {name}", graph.seconds, side.seconds, note="forward and backward"))
        if graph.peak_bytes and side.peak_bytes:
            rows.append(Row(f"peak memory: graph / {name}", graph.peak_bytes, side.peak_bytes, "B"))
    return rows


def _seconds(step: Step, device: str) -> float:
    """Wall seconds of one step, until the device is done with it."""
    _synchronize(device)
    began = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - began


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak_bytes(step: Step, program: Loss, device: str) -> int | None:
    """The most memory that tensors take in a step, weights included."""
    if device != "cuda":
        return None
    program.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated())


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def _plain(sides: dict[str, Side]) -> dict[str, Any]:
    return {name: vars(side) for name, side in sides.items()}


if __name__ == "__main__":
    main()
