"""Job: the processes that train together, and what they share of a model."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from torchspan.core.errors import CaptureError, PassError
from torchspan.core.graph import Graph, is_async_collective
from torchspan.core.report import Report
from torchspan.models._base import ModelSpec
from torchspan.parallel.mesh import DP_REPLICATE, DP_SHARD, Meshes, build_meshes, submesh
from torchspan.parallel.simple_fsdp import MixedPrecision
from torchspan.train._place import Place, Ranks, choose_place, place_of_group
from torchspan.train._rank import note_failure
from torchspan.train.check import degrees_of
from torchspan.train.config import Parallelism, TrainConfig
from torchspan.train.parallelize import parallelize


@dataclass(frozen=True)
class Job:
    """This process: `rank` of `world_size`, the `meshes` of all, and the `device` of its tensors."""

    rank: int = 0
    world_size: int = 1
    meshes: Meshes = field(default_factory=Meshes)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def mesh(self) -> DeviceMesh | None:
        """The mesh of all processes."""
        return self.meshes.dense

    @property
    def _data_parallel(self) -> list[DeviceMesh]:
        """The axes along which ranks have parts of a batch, outermost first."""
        axes = (submesh(self.mesh, axis) for axis in (DP_REPLICATE, DP_SHARD))
        return [axis for axis in axes if axis is not None]

    @property
    def num_data_parallel(self) -> int:
        """How many parts a batch is cut into."""
        return math.prod(axis.size() for axis in self._data_parallel)

    @property
    def data_parallel_rank(self) -> int:
        """Which part of a batch is this process's."""
        rank = 0
        for axis in self._data_parallel:
            rank = rank * axis.size() + axis.get_local_rank()
        return rank

    def total(self, loss: Tensor) -> float:
        """The loss of the whole batch, from each rank's share of it."""
        loss = loss.detach().clone()
        for axis in self._data_parallel:
            dist.all_reduce(loss, group=axis.get_group())
        return float(loss)

    def wait(self) -> None:
        """Until every process is here."""
        if self.mesh is not None:
            dist.barrier()


@contextmanager
def joined(parallelism: Parallelism, report: Report) -> Iterator[Job]:
    """The job that this process is part of: of the process group there is, or of a launcher's environment, or alone.

    Where each rank of this machine has a GPU of its own, the job is on GPUs and talks by NCCL, else on the CPU, by gloo. A
    process group that was made here is destroyed at the end.
    """
    if dist.is_initialized():
        gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
        yield _job(parallelism, dist.get_rank(), dist.get_world_size(), place_of_group(dist.get_backend_config(), gpu), report)
        return
    ranks = Ranks.of(os.environ)
    degrees_of(parallelism, ranks.world_size)  # a mistake is told before anyone waits for the others
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    place = choose_place(num_gpus, dist.is_available() and dist.is_nccl_available(), ranks)
    if place.device_type == "cuda":
        torch.cuda.set_device(place.device)
    if ranks.world_size == 1:
        yield _job(parallelism, 0, 1, place, report)
        return
    dist.init_process_group(place.backend)
    try:
        report.decide("parallel", "process group", place.backend, place.reason)
        yield _job(parallelism, ranks.rank, ranks.world_size, place, report)
    except BaseException as error:
        note_failure(error)
        raise
    finally:
        dist.destroy_process_group()


def _job(parallelism: Parallelism, rank: int, world_size: int, place: Place, report: Report) -> Job:
    """This process's part of a job at `place`, which the report is told."""
    report.decide("parallel", "device", place.device, place.reason)
    meshes = build_meshes(degrees_of(parallelism, world_size), world_size, place.device_type)
    return Job(rank, world_size, meshes, torch.device(place.device))


class Loss(nn.Module):
    """A model with its loss: cross-entropy of the next token, this rank's share of the mean over the whole batch.

    The gradients that FSDP adds up over the ranks are then those of the mean, and need no division.
    """

    def __init__(self, model: nn.Module, num_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.num_tokens = num_tokens

    @property
    def annotates(self) -> bool:
        """Whether the model marks the regions that are to be compiled."""
        return bool(getattr(getattr(self.model, "config", None), "annotate_regions", False))

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        logits_BSV: Tensor = self.model(tokens_BS)
        return F.cross_entropy(logits_BSV.flatten(0, 1).float(), labels_BS.flatten(), reduction="sum") / self.num_tokens


def build_program(spec: ModelSpec, config: TrainConfig, job: Job, annotate: bool) -> Loss:
    """The model of a job, sharded as its mesh says, with its loss; weights are drawn from the seed, alike on every rank."""
    flavour = replace(spec.flavour(config.config), annotate_regions=annotate)
    model = spec.build(flavour).init_weights(config.training.seed).to(job.device)  # type: ignore[operator]
    reshard = config.parallelism.reshard_after_forward == "always"
    parallelize(model, spec, job.meshes, _precision(config.parallelism), reshard)
    return Loss(model, config.training.global_batch_size * config.training.seq_len)


def _precision(parallelism: Parallelism) -> MixedPrecision:
    if parallelism.param_dtype == "float32":
        return MixedPrecision()
    return MixedPrecision(param_dtype=getattr(torch, parallelism.param_dtype), reduce_dtype=torch.float32)


def check_same_collectives(graph: Graph, job: Job, after: str = "") -> None:
    """Raise an error unless every rank's graph calls the same collectives in the same order: others would hang.

    That is a PassError which names the pass `after` which it is asked, or, without one, a CaptureError.
    """
    if job.mesh is None:
        return
    collectives = _collectives(graph)
    everyones: list[Any] = [None] * job.world_size
    dist.all_gather_object(everyones, hashlib.sha256(repr([collective[1:] for collective in collectives]).encode()).hexdigest())
    if len(set(everyones)) == 1:
        return
    differing = [rank for rank, digest in enumerate(everyones) if digest != everyones[0]]
    dist.all_gather_object(everyones, [tuple(map(str, collective)) for collective in collectives])
    where = _first_difference(everyones[0], everyones[differing[0]], differing[0])
    text = f"the graphs of ranks {differing} call other collectives than that of rank 0, and would wait for ever: {where}"
    if after:
        raise PassError(f"pass {after} gave back graphs that do not fit each other: {text}; does the pass look at its rank?")
    raise CaptureError(f"{text}; does the model branch on its rank?")


def _first_difference(first: list[tuple[str, ...]], others: list[tuple[str, ...]], rank: int) -> str:
    """Where two lists of collectives part, as text.

    >>> _first_difference([("gather_1", "gather", "[2]", "f32")], [], 1)
    'collective 1 is gather_1 (gather of [2] f32) on rank 0, and none on rank 1'
    """
    pairs = zip_longest(first, others)
    index, (left, right) = next((i, pair) for i, pair in enumerate(pairs, 1) if (pair[0] or ())[1:] != (pair[1] or ())[1:])
    shown = [f"{c[0]} ({c[1]} of {' '.join(c[2:])})" if c else "none" for c in (left, right)]
    return f"collective {index} is {shown[0]} on rank 0, and {shown[1]} on rank {rank}"


def _collectives(graph: Graph) -> list[tuple[str, str, Any, Any]]:
    """Name, kind, shape and dtype of what each collective moves; not the group, whose name differs by rank."""
    nodes = [node for node in graph.module.graph.nodes if is_async_collective(node)]
    values = [node.args[0].meta.get("val") for node in nodes]
    return [
        (node.name, str(node.target), getattr(v, "shape", None), getattr(v, "dtype", None)) for node, v in zip(nodes, values)
    ]
