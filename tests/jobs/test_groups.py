"""The process groups of a rank, as a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PROGRAM = """
import torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchspan.jobs import groups, transport
from torchspan.regions.collectives import collectives_of

assert groups.groups_here() is None
dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
mine, others = dist.new_group([0, 1]), dist.new_group([2, 3])  # this rank is in the first only
here = groups.groups_here()
assert here.rank == 1 and [ranks for _, ranks in here.named] == [(0, 1, 2, 3), (0, 1)], here
assert transport.groups_of(transport.dumps(1)) is None, "what is sent is alike on all ranks, unless it asks for groups"
assert transport.groups_of(transport.dumps(1, groups=here)) == here
assert transport.loads(transport.dumps(mine)) is mine
found = collectives_of(lambda: dist.all_reduce(torch.ones(2), group=mine))
assert [kind for kind, _ in found.issued] == ["allreduce"] and found.participants == (0, 1), found
found = collectives_of(lambda: torch.cond(torch.tensor(True), lambda x: x + 1, lambda x: x - 1, (torch.ones(2),)))
assert not found
dist.destroy_process_group()
groups.pretend(here)
assert groups.groups_here() == here
print("right")
"""


def test_a_rank_knows_its_groups_and_another_process_has_them_by_name(run_python: Callable[..., Any]) -> None:
    assert "right" in run_python(PROGRAM).stdout
