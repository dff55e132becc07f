"""The process groups of a job of several ranks, as a value; the compile process has fake ones of the same names and ranks.

A program names its groups in its collectives, in its meshes and in its attributes. In the compile process a collective returns
at once, with numbers that mean nothing: what is compiled there depends on the names and sizes of groups only.
"""

from __future__ import annotations

import copyreg
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from torchspan.core.replaced import entries_replaced
from torchspan.private import distributed

_SHARDED = "is sharded by FSDP, whose hooks cannot be sent; compile modules inside of it, or train with torchspan's SimpleFSDP"
_REPLICATED = "keeps a reducer, which cannot be sent and may run with all ranks only; compile it alone, or the module in it"


@dataclass(frozen=True)
class Groups:
    """This rank's groups, the default one first: of each its name and the global ranks that it has."""

    rank: int
    named: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def num_ranks(self) -> int:
        """How many ranks the job has."""
        return len(self.named[0][1])


def groups_here() -> Groups | None:
    """The groups of this process; None where it is not one of several ranks."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
        return None
    world = distributed.world()
    first = world.default_pg
    ordered = [first, *(group for group in list(world.pg_names) if group is not first)]
    return Groups(dist.get_rank(), tuple((world.pg_names[group], tuple(world.pg_group_ranks[group])) for group in ordered))


def pretend(groups: Groups) -> None:
    """Give this process fake groups of these names and ranks."""
    distributed.start_fake_job(groups.rank, groups.named)


def is_group(value: Any) -> bool:
    """Whether it is a process group, which cannot be sent but has a name."""
    return dist.is_available() and isinstance(value, dist.ProcessGroup)


def why_it_stays(module: torch.nn.Module) -> str | None:
    """Why a module cannot be sent: FSDP gathers its weights by hooks, or DDP reduces its gradients, in this process."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)):
        return _SHARDED
    return _REPLICATED if isinstance(module, DistributedDataParallel) else None


def reduced_group(group: Any) -> tuple[Callable[[str], Any], tuple[str]]:
    """What pickle is to write for a group."""
    return group_of, (str(group.group_name),)


def portable_groups() -> AbstractContextManager[None]:
    """Have pickle write a group by its name, and a deep copy of what holds a group hold the same one."""
    return entries_replaced(copyreg.dispatch_table, {dist.ProcessGroup: reduced_group} if dist.is_available() else {})


def group_of(name: str) -> Any:
    """The group of that name.

    Raises:
        LookupError: this process has no such group.
    """
    group = distributed.find_group(name)
    if group is None:
        raise LookupError(f"this process has no process group {name!r}")
    return group
