"""The whole program is one region: the fastest code, and a compile time that grows with the program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from torchspan.core.program import program_name
from torchspan.regions.part import Part
from torchspan.strategies._base import Cut, Request

SUMMARY = "the whole program as one region"


def cut(program: Callable[..., Any], request: Request) -> Cut:
    """One part: the program, or the module in DistributedDataParallel, whose reducer lives in this process only."""
    if isinstance(program, DistributedDataParallel):
        reason = "one region, the module in DistributedDataParallel: buckets and hooks stay torch's own"
        return Cut((Part(program_name(program.module), (program.module,), is_block=True),), reason)
    return Cut((Part(program_name(program), (program,)),), "one region")
