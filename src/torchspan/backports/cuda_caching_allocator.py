"""``torch.cuda.caching_allocator_disabled``: a block in which CUDA memory is taken from the driver itself, not from a cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from torchspan.backports._base import Backport


@contextmanager
def caching_allocator_disabled() -> Iterator[None]:
    """Take memory from the driver inside the block; afterwards it is as it was before."""
    was_enabled = _is_enabled()
    torch.cuda.memory.caching_allocator_enable(False)
    try:
        yield
    finally:
        torch.cuda.memory.caching_allocator_enable(was_enabled)


caching_allocator_disabled.__module__ = "torch.cuda.memory"


def _is_enabled() -> bool:
    """Whether memory is cached; where this torch cannot be asked, it is unless the variable of the allocator says no."""
    ask = getattr(torch._C, "_cuda_cudaCachingAllocator_is_enabled", None)
    return ask() if ask is not None else not os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING")


BACKPORT = Backport(
    name="cuda_caching_allocator",
    summary="a block without the cache of CUDA memory: torch.cuda.caching_allocator_disabled",
    target="torch.cuda.memory",
    since="2.12.0",
    upstream="https://github.com/pytorch/pytorch/tree/v2.12.0/torch/cuda/memory.py",
    differs="after the block the cache is on unless PYTORCH_NO_CUDA_MEMORY_CACHING is set: this torch cannot be asked",
    names={"caching_allocator_disabled": lambda: caching_allocator_disabled},
    elsewhere={"torch.cuda": {"caching_allocator_disabled": lambda: caching_allocator_disabled}},
)
