"""The training loop: the same step, run eagerly or as a captured graph that passes have changed."""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchspan.capture._choose import capture_training
from torchspan.capture._state import BoundGraph
from torchspan.core.graph import Graph
from torchspan.core.program import Program
from torchspan.core.report import Report, current_report
from torchspan.passes._base import PassContext
from torchspan.passes._pipeline import Pipeline
from torchspan.train._checkpointing import checkpoint_blocks
from torchspan.train._place import Ranks
from torchspan.train.check import Plan, check
from torchspan.train.config import Compile, TrainConfig
from torchspan.train.data import ByteTokens, part_of
from torchspan.train.job import Job, Loss, build_program, check_same_collectives, joined
from torchspan.train.watch import Watch

if TYPE_CHECKING:
    from torchspan.train._handing_over import HandingOver
    from torchspan.train._kept_step import KeptStep

log = logging.getLogger("torchspan.train")

Step = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TrainResult:
    """The loss of each step over the whole batch, the seconds that each took, and the Report."""

    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    report: Report


def main(config: TrainConfig, report: Report | None = None) -> int:
    """``torchspan train``: train as `config` says; logs a line a step on rank 0."""
    with _logging_to_terminal():
        train(config, report)
    return 0


def train(config: TrainConfig, report: Report | None = None) -> TrainResult:
    """Train a model; on every process of a job that a launcher started, or in this one alone.

    >>> from torchspan.train.config import Training
    >>> result = train(TrainConfig(config="tiny", training=Training(steps=2, global_batch_size=2, seq_len=8)))
    >>> len(result.losses), 5 < result.losses[0] < 6
    (2, True)
    """
    report = report or Report(parent=current_report())
    world_size = dist.get_world_size() if dist.is_initialized() else Ranks.of(os.environ).world_size
    plan = check(config, world_size)  # before anything that takes time: a mistake is told at once
    pipeline = plan.pipeline
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    with joined(config.parallelism, report) as job, flex_attention_provided(plan.spec.flavour(plan.flavour), job, report):
        annotate = config.compile.enable and any(
            pass_.reads_annotations and not getattr(pass_, "modules", "") for pass_ in pipeline.passes
        )
        program = build_program(plan.spec, config, job, annotate)
        if not config.compile.enable:
            checkpoint_blocks(program.model, config.activation_checkpoint, report)
        data = _Batches(config, job)
        settings = config.compile
        if settings.capture == "auto" and config.parallelism.reshard_after_forward == "always":
            settings = replace(settings, capture="train_step")
            report.decide("capture", "reshard after forward", "train_step", "a joint graph would keep gathered parameters")
        optimizer = torch.optim.AdamW(
            program.parameters(), lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay, betas=(0.9, 0.95)
        )
        kept = None if settings.artifact is None or not settings.enable else _kept_step(config, plan, job, program, report)
        step = _make_step(program, optimizer, data.at(0)[0], settings, pipeline, job, report, kept)
        losses, seconds = _run(step, optimizer, data, config, job)
    result = TrainResult(tuple(losses), tuple(seconds), report)
    if config.losses is not None and job.rank == 0:
        config.losses.write_text(json.dumps({"losses": losses, "seconds": seconds, "report": report.to_dict()}, indent=1))
    return result


class _Batches:
    """This rank's part of each step's batch, cut into micro-batches."""

    def __init__(self, config: TrainConfig, job: Job) -> None:
        self._tokens = ByteTokens.load(config.training.dataset)
        self._training = config.training
        self._job = job

    def at(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Tokens and labels (B, S) of each micro-batch of `step`."""
        training, job = self._training, self._job
        batch = self._tokens.batch(training.seed, step, training.global_batch_size, training.seq_len)
        parts = [part_of(part, job.data_parallel_rank, job.num_data_parallel).to(job.device) for part in batch]
        tokens, labels = (part.chunk(training.gradient_accumulation_steps) for part in parts)
        return list(zip(tokens, labels))


def _run(
    step: Step, optimizer: torch.optim.Optimizer, data: _Batches, config: TrainConfig, job: Job
) -> tuple[list[float], list[float]]:
    """Take the steps; losses and seconds of each."""
    losses: list[float] = []
    seconds: list[float] = []
    for index in range(config.training.steps):
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = sum(step(*batch).detach() for batch in data.at(index))
        if not config.compile.optimizer:
            optimizer.step()
        losses.append(job.total(torch.as_tensor(loss)))
        seconds.append(time.perf_counter() - began)
        if job.rank == 0:
            log.info("step %d  loss %.6f  %.3f s", index + 1, losses[-1], seconds[-1])
    return losses, seconds


# the step


def _make_step(
    program: Loss,
    optimizer: torch.optim.Optimizer,
    example: tuple[Tensor, Tensor],
    settings: Compile,
    pipeline: Pipeline,
    job: Job,
    report: Report,
    kept: KeptStep | None = None,
) -> Step:
    """The step as a function of tokens and labels that returns the loss.

    It leaves gradients in the parameters, or, where the optimizer is in the graph, has updated them.
    """
    if not settings.enable:
        reason = (
            "asked for" if not pipeline.passes else f"asked for; without a graph the passes {pipeline} have nothing to work on"
        )
        report.decide("capture", program.model.__class__.__name__, "eager", reason)
        return _eager(program)
    in_graph = optimizer if settings.optimizer else None
    graph = kept.load() if kept is not None else None
    if graph is not None:
        return BoundGraph(graph, program, accumulate=in_graph is None, optimizer=in_graph)
    began = time.perf_counter()
    with annotations_provided(report) if program.annotates else nullcontext():
        graph = capture_training(Program(program, example), settings.capture, report, in_graph)
    report.figure("capture_s", time.perf_counter() - began)
    check_same_collectives(graph, job)
    watch = Watch(settings, job, report)
    graph = _transformed(graph, settings, pipeline, job, report, watch)
    if kept is not None:
        kept.save(graph)
    step = BoundGraph(graph, program, accumulate=in_graph is None, optimizer=in_graph)
    watch.check_numbers(step, example)
    return step


def _eager(program: Loss) -> Step:
    def step(tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        loss: Tensor = program(tokens_BS, labels_BS)
        loss.backward()
        return loss

    return step


def _transformed(graph: Graph, settings: Compile, pipeline: Pipeline, job: Job, report: Report, watch: Watch) -> Graph:
    """The graph after the pipeline; where a pass compiles, rank 0 does, and hands the compiled code to the others."""
    handing_over = None
    if any(pass_.compiles for pass_ in pipeline.passes):
        handing_over = _handing_over(settings, job, report)
    compile_region = handing_over.compile_region if handing_over else None
    graph = pipeline.run(graph, PassContext(report, compile_region, settings.strict), watch.instruments)
    if handing_over is not None:
        handing_over.settle()
    watch.tell()
    return graph


def _kept_step(config: TrainConfig, plan: Plan, job: Job, program: Loss, report: Report) -> KeptStep:
    from torchspan.train._kept_step import KeptStep, entries_of

    assert config.compile.artifact is not None
    return KeptStep(config.compile.artifact, entries_of(config, plan, job, program), job, report)


def _handing_over(settings: Compile, job: Job, report: Report) -> HandingOver:
    from torchspan.jobs.budget import Budget
    from torchspan.train._handing_over import HandingOver

    return HandingOver(job, Budget(settings.budget_seconds, settings.budget_memory), report)


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
def flex_attention_provided(flavour: Any, job: Job, report: Report) -> Iterator[None]:
    """While this is open, FlexAttention can be trained on the device of `job`, if a model of `flavour` uses it."""
    if getattr(flavour, "attention", "sdpa") != "flex" or job.device.type != "cpu":
        yield
        return
    from torchspan.devices.flex_attention import training_patches
    from torchspan.environment.scope import Environment

    report.decide("attention", "FlexAttention", "dense operators", "eager torch has no other kernels of it for a CPU")
    with Environment(training_patches(), report), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")  # said above, once for all ranks
        yield


@contextmanager
def _logging_to_terminal() -> Iterator[None]:
    """Show this module's lines on the terminal."""
    handler = logging.StreamHandler()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
