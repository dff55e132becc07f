"""A model on meshes of many ranks, of which this process is the first: its graph does not know how many there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from torchspan.capture.train_step import capture_train_step
from torchspan.core.graph import Graph
from torchspan.core.program import Program
from torchspan.models._base import get_model
from torchspan.parallel.mesh import Degrees, build_meshes
from torchspan.train.job import Loss
from torchspan.train.parallelize import parallelize


@contextmanager
def ranks(num_ranks: int) -> Iterator[None]:
    """A process group of `num_ranks`, in which nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def graph_on(num_ranks: int, name: str, ep: int) -> Graph:
    """The training step of a model without numbers on `num_ranks`, two of them for tensor parallelism."""
    spec = get_model(name)
    with ranks(num_ranks):
        with torch.device("meta"):
            model = spec.build(spec.flavour("tiny"))
        parallelize(model, spec, build_meshes(Degrees(num_ranks // 2, 2, ep), num_ranks))
        tokens = torch.zeros(1, 16, dtype=torch.long, device="meta")
        return capture_train_step(Program(Loss(model, 16), (tokens, tokens)))


@pytest.mark.parametrize(("name", "ep"), [("llama3", 1), ("deepseek_v3", 8)])
def test_a_graph_has_as_many_nodes_on_many_ranks_as_on_few(name: str, ep: int) -> None:
    few, many = graph_on(16, name, ep), graph_on(1536, name, ep)  # 768 shards divide no parameter of a tiny model
    num_few, num_many = len(few.module.graph.nodes), len(many.module.graph.nodes)
    num_parameters = sum(spec.kind == "parameter" for spec in few.inputs)
    assert num_few <= num_many <= num_few + num_parameters, "one padding for each gradient that needs it, and no more"
    assert few.num_collectives() == many.num_collectives()
