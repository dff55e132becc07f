"""What torchspan uses of torch's process groups, by the names that operators know them by, and of symmetric memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from torchspan.core.replaced import replaced
from torchspan.private.names import names_in

NAMES = (
    *names_in("torch._C._distributed_c10d", "_register_process_group", "_resolve_process_group", "_unregister_process_group"),
    *names_in("torch.distributed._symmetric_memory", "enable_symm_mem_for_group"),
    *names_in("torch.distributed.distributed_c10d", "_process_group_name", "_world"),
    *names_in("torch.testing._internal.distributed.fake_pg", "FakeStore"),
)


def find_group(name: str) -> Any:
    """The process group that functional collectives know by `name`, or None."""
    from torch._C import _distributed_c10d

    resolve: Any = _distributed_c10d._resolve_process_group
    try:
        return resolve(name)
    except (RuntimeError, ValueError, LookupError):
        return None


def world() -> Any:
    """What torch keeps of the process groups of this process."""
    import torch.distributed as dist

    return dist.distributed_c10d._world


def start_fake_job(rank: int, groups: Sequence[tuple[str, Sequence[int]]]) -> None:
    """Make this process `rank` of a job that sends nothing; its groups, the default one first, have these very names."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    (first, ranks), *others = groups
    with _naming(first):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=len(ranks))
    add_groups(others)


def _naming(name: str) -> AbstractContextManager[None]:
    """Have the next group be called `name`, which is a number or a digest as torch would have it."""
    import torch.distributed as dist

    return replaced(dist.distributed_c10d, "_process_group_name", lambda *_, **__: name)


def start_fake_groups(rank: int, groups: Mapping[str, Sequence[int]]) -> None:
    """Make this process `rank` of a job that sends nothing; beside the default group it has groups of these names and ranks."""
    world_size = 1 + max(rank, *(member for members in groups.values() for member in members))
    start_fake_job(rank, [("torchspan", range(world_size)), *groups.items()])


def add_groups(groups: Iterable[tuple[str, Sequence[int]]]) -> None:
    """Make process groups of these names and ranks."""
    import torch.distributed as dist

    for name, members in groups:
        with _naming(name):
            dist.new_group(list(members))
        if name.isdigit():  # torch names the next group by counting, and takes no name twice
            world().group_count = max(world().group_count, int(name) + 1)


def fused_products(groups: Sequence[str]) -> tuple[Any, Any]:
    """torch's all-gather fused with products, and product fused with a reduce-scatter, over symmetric memory of `groups`."""
    import torch.distributed._symmetric_memory as symmetric_memory

    enable: Any = symmetric_memory.enable_symm_mem_for_group
    if not hasattr(enable, "__wrapped__"):  # a later torch does it itself, and warns
        for group in groups:
            enable(group)
    operators = torch.ops.symm_mem
    return operators.fused_all_gather_matmul.default, operators.fused_matmul_reduce_scatter.default


def group_size(name: str) -> int:
    """How many ranks the process group has that operators know by `name`."""
    size: int = find_group(name).size()
    return size


def group_ranks(name: str) -> list[int]:
    """The ranks of the process group that operators know by `name`."""
    from torch.distributed import get_process_group_ranks

    return get_process_group_ranks(find_group(name))


def name_group(group: Any, name: str) -> None:
    """Let operators know a process group by `name` as well, in place of what had that name, until groups are destroyed."""
    from torch._C import _distributed_c10d

    if find_group(name) is not None:
        _forget_group(name)
    register: Any = _distributed_c10d._register_process_group
    register(name, group)


def _forget_group(name: str) -> None:
    from torch._C import _distributed_c10d

    unregister: Any = _distributed_c10d._unregister_process_group
    unregister(name)
