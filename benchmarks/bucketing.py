"""Each bucketing of debug Llama's step on gloo ranks, beside the graph as captured: collectives, their bytes, time of a step.

All sides are steps of one model in one job, in turn; a step takes what its slowest rank took. Bytes are one rank's: of what
a gather or an all-reduce gives, and of what a scatter takes.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _harness import Row, arguments, seconds, write
from torch.multiprocessing.spawn import spawn

from torchspan.capture import BoundGraph, capture_train_step
from torchspan.core.graph import Graph
from torchspan.core.program import Program
from torchspan.models._base import get_model
from torchspan.parallel.mesh import Degrees, build_meshes
from torchspan.passes import Pipeline
from torchspan.train.config import TrainConfig, Training
from torchspan.train.data import ByteTokens, part_of
from torchspan.train.job import Job, build_program

BUCKETINGS = ("autobucketing_reordering", "transformer_block_bucketing")
GIVEN, TAKEN = ("all_gather_into_tensor", "all_reduce"), ("reduce_scatter_tensor",)


def main() -> None:
    """Measure, and write the rows."""
    options = arguments(__doc__ or "", config="debugmodel", dp_shard=2, tp=2, batch=8, seq_len=128, repeats=7)
    degrees = Degrees(dp_shard=options.dp_shard, tp=options.tp)
    config = TrainConfig("llama3", options.config, Training(global_batch_size=options.batch, seq_len=options.seq_len))
    with tempfile.TemporaryDirectory() as folder:
        spawn(measure, (folder, config, degrees, options.repeats), nprocs=degrees.world_size)
        results = json.loads(Path(folder, "found.json").read_text())
    captured = results["captured"]
    rows = [row for name in BUCKETINGS for row in compared(name, results[name], captured)]
    rows.append(Row("step, captured / eager", captured["step_s"], results["eager"]["step_s"]))
    write("bucketing", rows, options.out, job=f"{options.config}, dp_shard {options.dp_shard} × tp {options.tp}")


def compared(name: str, ours: dict[str, Any], captured: dict[str, Any]) -> list[Row]:
    """Rows of one bucketing over the graph as captured."""
    kinds = {f"{name}: {kind}": kind for kind in captured["collectives"]}
    return [
        *(Row(text, ours["collectives"].get(kind, 0), captured["collectives"][kind], "calls") for text, kind in kinds.items()),
        Row(f"{name}: sent", ours["bytes"], captured["bytes"], "B"),
        Row(f"{name}: step", ours["step_s"], captured["step_s"], note="other side: the graph as captured"),
    ]


def measure(rank: int, folder: str, config: TrainConfig, degrees: Degrees, repeats: int) -> None:
    """One rank of the job; the first one writes what was found to `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=degrees.world_size)
    job = Job(rank, degrees.world_size, build_meshes(degrees, degrees.world_size))
    program = build_program(get_model(config.module), config, job, annotate=True)
    whole = ByteTokens.load(None).batch(0, 0, config.training.global_batch_size, config.training.seq_len)
    inputs = tuple(part_of(tensor, job.data_parallel_rank, job.num_data_parallel) for tensor in whole)
    captured = capture_train_step(Program(program, inputs))
    graphs = {"captured": captured, **{name: Pipeline.parse(name).run(captured) for name in BUCKETINGS}}
    steps: dict[str, Callable[[], object]] = {"eager": lambda: program(*inputs).backward()}
    for name, graph in graphs.items():
        steps[name] = partial(BoundGraph(graph, program), *inputs)
    everyone: list[Any] = [None] * degrees.world_size
    dist.all_gather_object(everyone, taken_in_turn(steps, lambda: program.zero_grad(set_to_none=True), repeats))
    if rank == 0:
        results: dict[str, dict[str, Any]] = {}
        for name in steps:
            slowest = [max(of_ranks) for of_ranks in zip(*(mine[name] for mine in everyone))]
            results[name] = {"step_s": statistics.median(slowest)}
        for name, graph in graphs.items():
            results[name] |= {"collectives": graph.num_collectives(), "bytes": bytes_sent(graph)}
        Path(folder, "found.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def taken_in_turn(steps: dict[str, Callable[[], object]], before: Callable[[], None], repeats: int) -> dict[str, list[float]]:
    """Seconds of each step of each side, all ranks starting together; two rounds before warm up."""
    figures: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(-2, repeats):
        for name, step in steps.items():
            before()
            gc.collect()
            dist.barrier()
            duration = seconds(step)
            if repeat >= 0:
                figures[name].append(duration)
    return figures


def bytes_sent(graph: Graph) -> int:
    """Bytes of what a graph's collectives give, or take where they scatter."""
    total = 0
    for node in graph.module.graph.nodes:
        name = getattr(getattr(node.target, "_schema", None), "name", "").removeprefix("_c10d_functional::")
        value = node if name in GIVEN else node.args[0] if name in TAKEN else None
        if value is not None:
            total += value.meta["val"].numel() * value.meta["val"].element_size()
    return total


if __name__ == "__main__":
    main()
