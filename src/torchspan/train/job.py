"""Job: the processes that train together, and what they share of a model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from torchspan.core.errors import CaptureError, InputError
from torchspan.core.graph import Graph
from torchspan.core.report import Report
from torchspan.models._base import ModelSpec
from torchspan.parallel.mesh import DP_SHARD, TP, Degrees, build_mesh, check_sizes, submesh
from torchspan.parallel.simple_fsdp import MixedPrecision, apply_simple_fsdp
from torchspan.parallel.tensor_parallel import apply_tensor_parallel
from torchspan.train.config import Parallelism, TrainConfig


@dataclass(frozen=True)
class Job:
    """This process's place: `rank` of `world_size`, and the `mesh` of all, None if there is one process."""

    rank: int = 0
    world_size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def num_data_parallel(self) -> int:
        """How many parts a batch is cut into."""
        dp_mesh = submesh(self.mesh, DP_SHARD)
        return 1 if dp_mesh is None else dp_mesh.size()

    @property
    def data_parallel_rank(self) -> int:
        """Which part of a batch is this process's."""
        dp_mesh = submesh(self.mesh, DP_SHARD)
        return 0 if dp_mesh is None else dp_mesh.get_local_rank()

    def total(self, loss: Tensor) -> float:
        """The loss of the whole batch, from each rank's share of it."""
        dp_mesh = submesh(self.mesh, DP_SHARD)
        loss = loss.detach().clone()
        if dp_mesh is not None:
            dist.all_reduce(loss, group=dp_mesh.get_group())
        return float(loss)

    def wait(self) -> None:
        """Until every process is here."""
        if self.mesh is not None:
            dist.barrier()


def degrees_of(parallelism: Parallelism, world_size: int) -> Degrees:
    """The degrees of a job of `world_size` processes.

    >>> degrees_of(Parallelism(tensor_parallel_degree=2), 8)
    Degrees(dp_shard=4, tp=2)
    >>> degrees_of(Parallelism(data_parallel_shard_degree=2), 1)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    torchspan.core.errors.InputError: dp_shard 2 × tp 1 are 2 processes, this job has 1; set the degrees so that ...
    """
    tp, dp = parallelism.tensor_parallel_degree, parallelism.data_parallel_shard_degree
    if dp == -1 and tp > 0 and world_size % tp == 0:
        dp = world_size // tp
    degrees = Degrees(dp_shard=1 if dp == -1 else dp, tp=tp)
    degrees.check(world_size)
    return degrees


@contextmanager
def joined(parallelism: Parallelism, report: Report) -> Iterator[Job]:
    """The job that this process is part of: of the process group there is, or of torchrun's environment, or alone.

    A process group that was made here is destroyed at the end.
    """
    if dist.is_initialized():
        degrees = degrees_of(parallelism, dist.get_world_size())
        yield Job(dist.get_rank(), dist.get_world_size(), build_mesh(degrees, dist.get_world_size()))
        return
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    degrees = degrees_of(parallelism, world_size)
    if world_size == 1:
        yield Job()
        return
    dist.init_process_group("gloo")
    try:
        report.decide("parallel", "process group", "gloo", "training runs on the CPU")
        yield Job(dist.get_rank(), world_size, build_mesh(degrees, world_size))
    finally:
        dist.destroy_process_group()


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
    flavour = spec.flavour(config.config)
    if config.training.seq_len > flavour.max_seq_len:
        raise InputError(
            f"--training.seq_len is {config.training.seq_len}; {spec.name} {config.config} takes at most {flavour.max_seq_len}"
        )
    model = spec.build(replace(flavour, annotate_regions=annotate)).init_weights(config.training.seed)  # type: ignore[operator]
    tp_mesh = submesh(job.mesh, TP)
    if tp_mesh is not None:
        check_sizes({name: getattr(flavour, name) for name in spec.sizes}, tp_mesh.size())
        check_sizes({"--training.seq_len": config.training.seq_len}, tp_mesh.size())
        apply_tensor_parallel(model, tp_mesh, spec.tensor_parallel)
    if job.mesh is not None:
        apply_simple_fsdp(model, job.mesh, _precision(config.parallelism))
    return Loss(model, config.training.global_batch_size * config.training.seq_len)


def _precision(parallelism: Parallelism) -> MixedPrecision:
    if parallelism.param_dtype == "float32":
        return MixedPrecision()
    return MixedPrecision(param_dtype=getattr(torch, parallelism.param_dtype), reduce_dtype=torch.float32)


def check_same_collectives(graph: Graph, job: Job) -> None:
    """Raise CaptureError unless every rank's graph calls the same collectives in the same order: others would hang."""
    if job.mesh is None:
        return
    mine = hashlib.sha256(repr(_collectives(graph)).encode()).hexdigest()
    all_digests: list[Any] = [None] * job.world_size
    dist.all_gather_object(all_digests, mine)
    if len(set(all_digests)) > 1:
        differing = [rank for rank, digest in enumerate(all_digests) if digest != all_digests[0]]
        raise CaptureError(
            f"the graphs of ranks {differing} call other collectives than that of rank 0, and would wait for ever; "
            "does the model branch on its rank?"
        )


def _collectives(graph: Graph) -> list[tuple[str, Any, Any]]:
    """Kind, shape and dtype of what each collective moves; not the group, whose name differs by rank."""
    nodes = [node for node in graph.module.graph.nodes if str(node.target).startswith("_c10d_functional.")]
    values = [node.args[0].meta.get("val") for node in nodes]
    return [(str(node.target), getattr(v, "shape", None), getattr(v, "dtype", None)) for node, v in zip(nodes, values)]
