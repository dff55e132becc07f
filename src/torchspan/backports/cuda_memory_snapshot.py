"""``torch.cuda.memory_snapshot(include_traces=)``: the allocator's segments, which never hold the traces."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torchspan.backports._base import Backport


def _taking_traces(memory_snapshot: Callable[..., Any]) -> Callable[..., Any]:
    """memory_snapshot, with `include_traces`: traces only cost time, they are no part of what is returned."""

    @functools.wraps(memory_snapshot)
    def snapshot(mempool_id: Any = None, include_traces: bool = True) -> Any:
        if not include_traces:
            BACKPORT.record_use("memory_snapshot(include_traces=False): they are collected and left out")
        return memory_snapshot(mempool_id)

    return snapshot


def _lacks(module: ModuleType | None) -> bool:
    return module is None or "include_traces" not in inspect.signature(inspect.unwrap(module.memory_snapshot)).parameters


BACKPORT = Backport(
    name="cuda_memory_snapshot",
    summary="torch.cuda.memory_snapshot(include_traces=…)",
    target="torch.cuda.memory",
    since="2.11.0",
    upstream="https://github.com/pytorch/pytorch/blob/v2.11.0/torch/cuda/memory.py",
    differs="with include_traces=False it takes as long as with them",
    redefines={"memory_snapshot": _taking_traces},
    lacks=_lacks,
)
