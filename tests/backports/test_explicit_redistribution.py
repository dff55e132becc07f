"""Inside of the context a DTensor that would be redistributed unasked is an error; what was asked for is not."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from torchspan.environment.scope import Environment


@pytest.fixture
def adding(environment: Environment) -> Iterator[functools.partial[torch.Tensor]]:
    """The sum of a tensor cut by rows and one cut by columns, as the first of two ranks sees it."""
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    rows, columns = (distribute_tensor(torch.ones(4, 4), mesh, [Shard(dim)]) for dim in (0, 1))
    yield functools.partial(torch.add, rows, columns)
    distributed.destroy_process_group()


def test_unasked_redistributions_are_errors_inside_only(adding: functools.partial[torch.Tensor]) -> None:
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import ExplicitRedistributionContext

    rows, columns = adding.args
    adding()
    with ExplicitRedistributionContext():
        with pytest.raises(RuntimeError, match="Implicit redistribution occurred"):
            adding()
        torch.add(rows, columns.redistribute(placements=[Shard(0)]))
        with ExplicitRedistributionContext(enable=False):
            adding()
        with pytest.raises(RuntimeError, match="Implicit redistribution occurred"):
            adding()
    adding()


def test_a_warning_can_take_the_errors_place(adding: functools.partial[torch.Tensor]) -> None:
    from torch.distributed.tensor._utils import ExplicitRedistributionContext

    logging.disable(logging.CRITICAL)
    try:
        with ExplicitRedistributionContext(mode="warn"):
            adding()
    finally:
        logging.disable(logging.NOTSET)
    with pytest.raises(RuntimeError, match="Invalid mode other"):
        ExplicitRedistributionContext(mode="other")
