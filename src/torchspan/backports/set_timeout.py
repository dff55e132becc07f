"""``torch.distributed.set_timeout``: how long later operations of a process group may take."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torchspan.backports._base import Backport


def set_timeout(timeout: timedelta, group: Any = None) -> None:
    """Set how long later operations of a group may take; a backend that cannot change it warns.

    Args:
        timeout: for each operation.
        group: the group; the default group if None.

    Raises:
        ValueError: this process is not in the group.
    """
    import torch.distributed.distributed_c10d as module

    set_pg_timeout: Any = module._set_pg_timeout
    set_pg_timeout(timeout, group)


set_timeout.__module__ = "torch.distributed.distributed_c10d"

BACKPORT = Backport(
    name="set_timeout",
    summary="how long operations of a process group may take: torch.distributed.set_timeout",
    target="torch.distributed",
    since="2.14.0",
    upstream="https://github.com/pytorch/pytorch/blob/v2.14.0/torch/distributed/distributed_c10d.py",
    differs="backends other than gloo and NCCL keep theirs, with a warning",
    names={"set_timeout": lambda: set_timeout},
    elsewhere={"torch.distributed.distributed_c10d": {"set_timeout": lambda: set_timeout}},
)
