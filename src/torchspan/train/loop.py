"""The training loop: the same step, run eagerly or as a captured graph that passes have changed."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.logging import RichHandler
from torch import Tensor
from torch.fx import GraphModule

from torchspan.capture._choose import capture_training
from torchspan.capture._state import BoundGraph
from torchspan.core.errors import InputError
from torchspan.core.graph import Graph
from torchspan.core.program import Program
from torchspan.core.report import Report, current_report
from torchspan.models._base import get_model
from torchspan.passes._base import CompileRegion, PassContext
from torchspan.passes._instruments import Counts, Dump, Instrument, Timing
from torchspan.passes._pipeline import Pipeline
from torchspan.train.config import Compile, TrainConfig, parse_config
from torchspan.train.data import VOCAB_SIZE, ByteTokens, part_of
from torchspan.train.job import Job, Loss, build_program, check_same_collectives, joined

if TYPE_CHECKING:
    from torchspan.train._handing_over import HandingOver

log = logging.getLogger("torchspan.train")

Step = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TrainResult:
    """The loss of each step over the whole batch, the seconds each took, and how it came about."""

    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    report: Report


def main(argv: Sequence[str], report: Report | None = None) -> int:
    """``torchspan train``: train as `argv` says; logs a line a step on rank 0."""
    config = parse_config(argv)
    if config is None:
        return 0
    with _logging_to_terminal():
        train(config, report)
    return 0


def train(config: TrainConfig, report: Report | None = None) -> TrainResult:
    """Train a model; on every process of a job that torchrun started, or in this one alone.

    >>> from torchspan.train.config import Training
    >>> result = train(TrainConfig(config="tiny", training=Training(steps=2, global_batch_size=2, seq_len=8)))
    >>> len(result.losses), 5 < result.losses[0] < 6
    (2, True)
    """
    report = report or Report(parent=current_report())
    pipeline = Pipeline.parse(config.compile.passes)  # before anything that takes time: a mistake in it is told at once
    spec = get_model(config.module)
    spec.flavour(config.config)
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    with joined(config.parallelism, report) as job:
        annotate = config.compile.enable and any(one.compiles and not getattr(one, "modules", "") for one in pipeline.passes)
        program = build_program(spec, config, job, annotate)
        if spec.flavour(config.config).vocab_size < VOCAB_SIZE:
            raise InputError(f"{config.config} has {spec.flavour(config.config).vocab_size} tokens; bytes need {VOCAB_SIZE}")
        data = _Batches(config, job)
        step = _make_step(program, data.at(0), config.compile, pipeline, job, report)
        losses, seconds = _run(step, program, data, config, job)
    result = TrainResult(tuple(losses), tuple(seconds), report)
    if config.losses is not None and job.rank == 0:
        config.losses.write_text(json.dumps({"losses": losses, "seconds": seconds, "report": report.to_dict()}, indent=1))
    return result


class _Batches:
    """This rank's part of each step's batch."""

    def __init__(self, config: TrainConfig, job: Job) -> None:
        self._tokens = ByteTokens.load(config.training.dataset)
        self._training = config.training
        self._job = job

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and labels (B, S) of `step`."""
        training, job = self._training, self._job
        batch = self._tokens.batch(training.seed, step, training.global_batch_size, training.seq_len)
        tokens_BS, labels_BS = (part_of(part, job.data_parallel_rank, job.num_data_parallel) for part in batch)
        return tokens_BS, labels_BS


def _run(step: Step, program: Loss, data: _Batches, config: TrainConfig, job: Job) -> tuple[list[float], list[float]]:
    """Take the steps; losses and seconds of each."""
    optimizer = torch.optim.AdamW(
        program.parameters(), lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay, betas=(0.9, 0.95)
    )
    losses: list[float] = []
    seconds: list[float] = []
    for index in range(config.training.steps):
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = step(*data.at(index))
        optimizer.step()
        losses.append(job.total(loss))
        seconds.append(time.perf_counter() - began)
        if job.rank == 0:
            log.info("step %d  loss %.6f  %.3f s", index + 1, losses[-1], seconds[-1])
    return losses, seconds


# the step


def _make_step(
    program: Loss, example: tuple[Tensor, Tensor], settings: Compile, pipeline: Pipeline, job: Job, report: Report
) -> Step:
    """The step as a function of tokens and labels that leaves gradients in the parameters and returns the loss."""
    if not settings.enable:
        reason = (
            "asked for" if not pipeline.passes else f"asked for; without a graph the passes {pipeline} have nothing to work on"
        )
        report.decide("capture", program.model.__class__.__name__, "eager", reason)
        return _eager(program)
    began = time.perf_counter()
    with annotations_provided(report) if program.annotates else nullcontext():
        graph = capture_training(Program(program, example), settings.capture, report)
    report.figure("capture_s", time.perf_counter() - began)
    graph = _transformed(graph, settings, pipeline, job, report)
    check_same_collectives(graph, job)
    return BoundGraph(graph, program)


def _eager(program: Loss) -> Step:
    def step(tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        loss: Tensor = program(tokens_BS, labels_BS)
        loss.backward()
        return loss

    return step


def _transformed(graph: Graph, settings: Compile, pipeline: Pipeline, job: Job, report: Report) -> Graph:
    """The graph after the pipeline; where a pass compiles, rank 0 does, and hands the compiled code to the others."""
    counts = Counts()
    instruments: list[Instrument] = [Timing(report), counts]
    if settings.dump is not None and job.rank == 0:
        instruments.append(Dump(settings.dump))
    handing_over = None
    if job.mesh is not None and any(one.compiles for one in pipeline.passes):
        handing_over = _handing_over(settings, job, report)
    compile_region = handing_over.compile_region if handing_over else bounded(settings, report)
    graph = pipeline.run(graph, PassContext(report, compile_region), instruments)
    if handing_over is not None:
        handing_over.settle()
    for name, before, after in counts.rows:
        report.decide("pass", f"{name}: graph", _difference(before, after), "counted before and after")
    return graph


def _difference(before: dict[str, int], after: dict[str, int]) -> str:
    """What changed between two counts, as text.

    >>> _difference({"nodes": 9, "all_reduce": 2}, {"nodes": 7, "all_reduce": 2})
    'nodes 9 → 7'
    """
    names = [name for name in {**before, **after} if before.get(name, 0) != after.get(name, 0)]
    return ", ".join(f"{name} {before.get(name, 0)} → {after.get(name, 0)}" for name in names) or "nothing changed"


def _handing_over(settings: Compile, job: Job, report: Report) -> HandingOver:
    from torchspan.strategies._budget import Budget
    from torchspan.train._handing_over import HandingOver

    return HandingOver(job, Budget(settings.budget_seconds, settings.budget_memory), report)


def bounded(settings: Compile, report: Report) -> CompileRegion:
    """Compiles a region in a child process, within the budget; what fails there runs as it is."""
    from torchspan.strategies._budget import Budget
    from torchspan.strategies._graph import compile_graph

    budget = Budget(settings.budget_seconds, settings.budget_memory)

    def compile_region(module: GraphModule, inputs: Sequence[Any], name: str) -> Callable[..., Any]:
        return compile_graph(module, inputs, budget=budget, report=report, region=name)

    return compile_region


@contextmanager
def annotations_provided(report: Report) -> Iterator[None]:
    """While this is open, ``torch.fx.traceback.annotate`` is there: torch's, or the backport of it."""
    if hasattr(torch.fx.traceback, "annotate"):
        yield
        return
    from torchspan.backports._base import REGISTRY
    from torchspan.environment.scope import Environment

    with Environment(REGISTRY.get("annotate").BACKPORT.patches(), report):
        yield


@contextmanager
def _logging_to_terminal() -> Iterator[None]:
    """Show this module's lines on the terminal, in the look of the rest of the command line."""
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_level=False, markup=False)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
