"""``tensor[:, 1]`` of a DTensor that is whole on every rank leaves the tensor's own shape as it is."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torchspan.backports._base import Backport


def _of_its_own(strategy: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of select, whose result is described by itself: old torch writes its shape into what describes the input."""

    @functools.wraps(strategy)
    def select(op_schema: Any) -> Any:
        found = strategy(op_schema)
        for one in found.strategies:
            one.output_specs = copy.copy(one.output_specs)
        return found

    return select


def _lacks(module: ModuleType | None) -> bool:
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    return hasattr(ShardingPropagator, "_wrap_output_spec_tensor_meta")  # it writes into what it is given


BACKPORT = Backport(
    name="dtensor_select",
    summary="an index into a replicated DTensor leaves the tensor's own shape as it is",
    target="torch.distributed.tensor._ops._tensor_ops",
    since="2.10.0",
    upstream="https://github.com/pytorch/pytorch/blob/v2.10.0/torch/distributed/tensor/_sharding_prop.py",
    redefines={"select_int_strategy": _of_its_own},
    lacks=_lacks,
)
