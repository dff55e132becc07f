"""``--compile.bisect``: which pass changes numbers that it should not, asked with a job's own first batch, on its ranks."""

from __future__ import annotations

import logging
from typing import Any

import torch.distributed as dist
from torch import Tensor

from torchspan.capture._state import BoundGraph
from torchspan.core.errors import PassError
from torchspan.passes._bisect import Stages, bisect
from torchspan.train.job import Job

log = logging.getLogger("torchspan.train")


def check_numbers(stages: Stages, step: BoundGraph, example: tuple[Tensor, Tensor], job: Job) -> None:
    """Run the graph after each pass on the first batch; PassError, which names pass and node, where numbers differ.

    It costs a step a pass, and two more of the captured graph. Nothing of the program is changed.
    """
    arguments = step.arguments(*example)

    def gather(value: Any) -> list[Any]:
        if job.mesh is None:
            return [value]
        everyones: list[Any] = [None] * job.world_size
        dist.all_gather_object(everyones, value)
        return everyones

    finding = bisect(stages.stages, arguments, gather)
    if finding is not None:
        raise PassError(finding.text)
    if job.rank == 0:
        claims = ", ".join(f"{stage.pass_} ({stage.pass_.claim()})" for stage in stages.stages)
        log.info("bisect: on the first batch every pass keeps what it claims of the numbers: %s", claims or "there is none")
