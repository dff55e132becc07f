"""The measurements of ``capture_and_passes.py``, each made in a process of its own.

    python benchmarks/_capture_measures.py NAME '{"option": value}'

prints what the function NAME returns, as JSON. Seconds are wall seconds. What a capture or a compile imports, functions import
themselves: it is part of what is timed.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _harness import seconds
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from torchspan.core.graph import Graph
from torchspan.core.program import Program
from torchspan.models._base import ModelSpec, get_model
from torchspan.parallel.mesh import Degrees, Meshes, build_meshes
from torchspan.parallel.simple_fsdp import MixedPrecision
from torchspan.train.config import TrainConfig, Training
from torchspan.train.data import ByteTokens, part_of
from torchspan.train.job import Job, Loss, build_program
from torchspan.train.parallelize import parallelize

PASS = "transformer_block_bucketing"
Options = dict[str, Any]


def cold_graph(module: str, config: str, batch: int, seq_len: int, capture: str) -> Options:
    """Seconds of the first capture of a process and of the pass over it, imports included."""
    program, inputs = _program(module, config, batch, seq_len)

    def capture_and_transform() -> None:
        _transformed(_captured(program, inputs, capture))

    return {"seconds": seconds(capture_and_transform)}


def cold_compile(module: str, config: str, batch: int, seq_len: int) -> Options:
    """Seconds that the first compiled step of a process takes longer than a later one; the cache folder is empty before."""
    program, inputs = _program(module, config, batch, seq_len)
    compiled = torch.compile(program, dynamic=False)
    first = seconds(lambda: _step(compiled, inputs))
    later = seconds(lambda: _step(compiled, inputs))
    return {"seconds": first - later}


def growth(module: str, config: str, batch: int, seq_len: int, capture: str, layers: list[int], repeats: int) -> Options:
    """Seconds of the capture of each number of layers, taken in turn, and nodes of its graph."""
    programs = {number: _program(module, config, batch, seq_len, number) for number in layers}
    _captured(*programs[min(layers)], capture)  # the first capture of a process imports
    figures: dict[int, list[float]] = {number: [] for number in layers}
    nodes: dict[int, int] = {}

    def measure(number: int) -> None:
        graph = _captured(*programs[number], capture)
        nodes[number] = len(graph.module.graph.nodes)

    for _ in range(repeats):
        for number in layers:
            gc.collect()
            figures[number].append(seconds(lambda n=number: measure(n)))  # type: ignore[misc]
    return {"seconds": [figures[number] for number in layers], "nodes": [nodes[number] for number in layers]}


def steps(module: str, config: str, batch: int, seq_len: int, capture: str, repeats: int) -> Options:
    """Seconds of each step of the graph and of each of eager, in turn, in one process."""
    program, inputs = _program(module, config, batch, seq_len)
    graph, eager = _steps_in_turn(program, inputs, capture, repeats)
    return {"graph": graph, "eager": eager}


def steps_on_ranks(
    module: str, config: str, batch: int, seq_len: int, capture: str, repeats: int, degrees: dict[str, int]
) -> Options:
    """As `steps`, on as many gloo ranks as `degrees` say, a thread each; a step takes what its slowest rank took."""
    world_size = Degrees(**degrees).world_size
    train_config = TrainConfig(module, config, Training(global_batch_size=batch, seq_len=seq_len))
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (world_size, folder, train_config, degrees, capture, repeats), nprocs=world_size)
        return dict(json.loads(Path(folder, "seconds.json").read_text()))


def _rank(
    rank: int, world_size: int, folder: str, config: TrainConfig, degrees: dict[str, int], capture: str, repeats: int
) -> None:
    """One rank of `steps_on_ranks`; the first one writes the seconds to `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    job = Job(rank, world_size, build_meshes(Degrees(**degrees), world_size))
    program = build_program(get_model(config.module), config, job, annotate=False)
    whole = ByteTokens.load(None).batch(0, 0, config.training.global_batch_size, config.training.seq_len)
    inputs = tuple(part_of(tensor, job.data_parallel_rank, job.num_data_parallel) for tensor in whole)
    mine = _steps_in_turn(program, inputs, capture, repeats, dist.barrier)
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, mine)
    slowest = [[max(of_ranks) for of_ranks in zip(*side)] for side in zip(*everyone)]
    if rank == 0:
        Path(folder, "seconds.json").write_text(json.dumps(dict(zip(("graph", "eager"), slowest))))
    dist.destroy_process_group()


def scale(module: str, config: str, layers: int, degrees: dict[str, int], seq_len: int, capture: str) -> Options:
    """Nodes, seconds of capture and of the pass, and peak memory, of the first of as many ranks as `degrees` say.

    The model is on the meta device, and computes in bfloat16.
    """
    with _fake_job(degrees) as meshes:
        program, inputs = _meta_program(module, config, layers, meshes, seq_len)
        graphs_of: list[Graph] = []
        capture_s = seconds(lambda: graphs_of.append(_captured(program, inputs, capture)))
        pass_s = seconds(lambda: graphs_of.append(_transformed(graphs_of[0])))
    nodes, nodes_after = (len(graph.module.graph.nodes) for graph in graphs_of)
    measured = {"nodes": nodes, "nodes_after_pass": nodes_after, "capture_s": capture_s, "pass_s": pass_s}
    return {**measured, "peak_bytes": _peak_bytes()}


def passes(
    module: str, config: str, layers: list[int], degrees: dict[str, int], seq_len: int, capture: str, repeats: int
) -> Options:
    """Seconds of the pass over the graph of each number of layers, taken in turn, and nodes of the graph."""
    with _fake_job(degrees) as meshes:
        graphs = [_captured(*_meta_program(module, config, number, meshes, seq_len), capture) for number in layers]
        _transformed(graphs[0])  # the first run of a process imports
        figures: list[list[float]] = [[] for _ in graphs]
        for _ in range(repeats):
            for graph, seconds_of_graph in zip(graphs, figures):
                gc.collect()
                seconds_of_graph.append(seconds(lambda g=graph: _transformed(g)))  # type: ignore[misc]
    return {"seconds": figures, "nodes": [len(graph.module.graph.nodes) for graph in graphs]}


def collectives(module: str, config: str, batch: int, seq_len: int, capture: str, degrees: dict[str, int]) -> Options:
    """Nodes and collectives of each kind, before and after the pass, of the first of as many ranks as `degrees` say."""
    from torchspan.passes._instruments import count

    with _fake_job(degrees) as meshes:
        job = Job(0, Degrees(**degrees).world_size, meshes)
        train_config = TrainConfig(module, config, Training(global_batch_size=batch, seq_len=seq_len))
        program = build_program(get_model(module), train_config, job, annotate=False)
        tokens_BS = torch.zeros(batch // job.num_data_parallel, seq_len, dtype=torch.long)
        graph = _captured(program, (tokens_BS, tokens_BS), capture)
        return {"before": count(graph), "after": count(_transformed(graph))}


# what they share


def _program(
    module: str, config: str, batch: int, seq_len: int, layers: int | None = None
) -> tuple[Loss, tuple[Tensor, Tensor]]:
    """A model with its loss in one process, and tokens and labels, each (B, S), int64."""
    spec = get_model(module)
    sizes = spec.flavour(config) if layers is None else _with_layers(spec, config, layers)
    model: nn.Module = spec.build(sizes).init_weights(0)  # type: ignore[operator]
    return Loss(model, batch * seq_len), ByteTokens.load(None).batch(0, 0, batch, seq_len)


def _with_layers(spec: ModelSpec, config: str, layers: int) -> Any:
    """A configuration with another number of layers, of which one is dense where others are not."""
    sizes = spec.flavour(config)
    dense = {"num_dense_layers": 1} if hasattr(sizes, "num_dense_layers") else {}
    return replace(sizes, num_layers=layers, **dense)


def _meta_program(module: str, config: str, layers: int, meshes: Meshes, seq_len: int) -> tuple[Loss, tuple[Tensor, Tensor]]:
    """A model without memory, its parameters on `meshes`, with its loss, and one sequence of tokens (1, S), int64."""
    spec = get_model(module)
    with torch.device("meta"):
        model = spec.build(_with_layers(spec, config, layers))
        tokens_BS = torch.zeros(1, seq_len, dtype=torch.long)
    parallelize(model, spec, meshes, MixedPrecision(torch.bfloat16, torch.float32))
    return Loss(model, seq_len), (tokens_BS, tokens_BS)


@contextmanager
def _fake_job(degrees: dict[str, int]) -> Iterator[Meshes]:
    """The meshes of a job of which this process is the first rank and the only one: nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world_size = Degrees(**degrees).world_size
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield build_meshes(Degrees(**degrees), world_size)
    finally:
        dist.destroy_process_group()


def _captured(program: Loss, inputs: tuple[Tensor, ...], capture: str) -> Graph:
    from torchspan.capture._choose import capture_training

    return capture_training(Program(program, inputs), capture)


def _transformed(graph: Graph) -> Graph:
    from torchspan.passes._pipeline import Pipeline

    return Pipeline.parse(PASS).run(graph)


def _step(program: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    """Forward and backward."""
    program(*inputs).backward()


def _steps_in_turn(
    program: Loss,
    inputs: tuple[Tensor, ...],
    capture: str,
    repeats: int,
    start_together: Callable[[], object] = lambda: None,
) -> tuple[list[float], list[float]]:
    """Seconds of each step of the graph, and of each of eager; both first set gradients to None, as a training loop does."""
    from torchspan.capture._state import BoundGraph

    bound = BoundGraph(_captured(program, inputs, capture), program)

    def graph() -> None:
        program.zero_grad(set_to_none=True)
        bound(*inputs)

    def eager() -> None:
        program.zero_grad(set_to_none=True)
        _step(program, inputs)

    sides: list[Callable[[], object]] = [graph, eager]
    figures: tuple[list[float], list[float]] = ([], [])
    for repeat in range(-2, repeats):  # two rounds to warm up
        gc.collect()
        for side, seconds_of_side in zip(sides, figures):
            start_together()
            duration = seconds(side)
            if repeat >= 0:
                seconds_of_side.append(duration)
    return figures


def _peak_bytes() -> int:
    """The most resident memory of this process; ``getrusage`` would count what its parent had before it started this one."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


MEASUREMENTS = {
    measure.__name__: measure
    for measure in (cold_graph, cold_compile, growth, steps, steps_on_ranks, scale, passes, collectives)
}


if __name__ == "__main__":
    print(json.dumps(MEASUREMENTS[sys.argv[1]](**json.loads(sys.argv[2]))))
