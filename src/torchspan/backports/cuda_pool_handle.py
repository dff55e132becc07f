"""``torch.cuda._POOL_HANDLE``: the type of what names a memory pool of CUDA graphs."""

from __future__ import annotations

from typing import NewType

from torchspan.backports._base import Backport

_POOL_HANDLE = NewType("_POOL_HANDLE", tuple[int, int])
_POOL_HANDLE.__module__ = "torch.cuda"

BACKPORT = Backport(
    name="cuda_pool_handle",
    summary="the type of a handle of a CUDA graph memory pool, for annotations: torch.cuda._POOL_HANDLE",
    target="torch.cuda",
    since="2.9.0",
    upstream="https://github.com/pytorch/pytorch/pull/156158",
    names={"_POOL_HANDLE": lambda: _POOL_HANDLE},
)
