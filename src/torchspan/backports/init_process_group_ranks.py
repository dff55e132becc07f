"""``init_process_group(…, _ranks=…)``: several default groups on one store, each named by its ranks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torchspan.backports._base import Backport
from torchspan.core.replaced import replaced

_PLACE = "torch.distributed.distributed_c10d"


def _with_ranks(init_process_group: Callable[..., None]) -> Callable[..., None]:
    """init_process_group, with `_ranks`: the name of the group, by which its ranks meet, is made of them."""
    from torch.distributed import distributed_c10d

    name_of = distributed_c10d._process_group_name

    @functools.wraps(init_process_group)
    def init(*args: Any, _ranks: list[int] | None = None, **kwargs: Any) -> None:
        if not _ranks:
            init_process_group(*args, **kwargs)
            return
        BACKPORT.record_use(f"init_process_group(_ranks={_ranks})")

        def of_ranks(ranks: list[int], use_hashed_name: bool) -> str:
            return name_of(ranks, use_hashed_name) if ranks else name_of(_ranks, True)

        with replaced(distributed_c10d, "_process_group_name", of_ranks):
            init_process_group(*args, **kwargs)

    return init


def _lacks(module: ModuleType | None) -> bool:
    return module is not None and "_ranks" not in inspect.signature(module.init_process_group).parameters


BACKPORT = Backport(
    name="init_process_group_ranks",
    summary="init_process_group(_ranks=…): a default group named by its ranks",
    target=_PLACE,
    since="2.10.0",
    upstream="https://github.com/pytorch/pytorch/pull/166182",
    redefines={"init_process_group": _with_ranks},
    lacks=_lacks,
)
