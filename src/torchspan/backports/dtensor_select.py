"""``tensor[:, 1]`` of a DTensor that is whole on every rank leaves the tensor's own shape as it is."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torchspan.backports._base import Backport


def _of_its_own(strategy: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of select, with a description of the result that is not the input's: old torch changes its shape afterwards."""

    @functools.wraps(strategy)
    def select(op_schema: Any) -> Any:
        choices = strategy(op_schema)
        for choice in choices.strategies:
            choice.output_specs = copy.copy(choice.output_specs)
        return choices

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
