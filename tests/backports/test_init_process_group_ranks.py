"""A default group that is given its ranks is named by them, so that two of them can meet on one store."""

from __future__ import annotations

import pytest
from torch import distributed

from torchspan.environment.scope import Environment


@pytest.mark.parametrize("ranks", [None, [], [0], [4, 5]])
def test_the_default_group_is_named_by_its_ranks(environment: Environment, ranks: list[int] | None) -> None:
    from torch.distributed import distributed_c10d

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1, _ranks=ranks)
    try:
        name = distributed_c10d._get_process_group_name(distributed.group.WORLD)
        assert name.isdigit() == (not ranks)  # a hash of the ranks, or a running number
        assert distributed.get_world_size() == 1
        assert distributed.new_group([0]) is not None  # later groups are named as ever
    finally:
        distributed.destroy_process_group()


def test_the_function_stays_the_object_it_was(environment: Environment) -> None:
    from torch.distributed import distributed_c10d

    assert distributed.init_process_group is distributed_c10d.init_process_group
