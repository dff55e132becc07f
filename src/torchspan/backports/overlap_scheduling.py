"""``torch._inductor.fx_passes.overlap_scheduling``: reorder collectives so that they overlap with compute, and bucket them."""

from __future__ import annotations

from torchspan.backports._base import Backport

BACKPORT = Backport(
    name="overlap_scheduling",
    summary="reorder collectives to overlap with compute, and bucket them: torch._inductor.fx_passes.overlap_scheduling",
    target="torch._inductor.fx_passes.overlap_scheduling",
    since="2.10.0",
    upstream="https://github.com/pytorch/pytorch/pull/163960",
    names={
        "schedule_overlap_bucketing": lambda: None,
        "schedule_overlap_bucketing_from_inductor_configs": lambda: None,
        "OverlapScheduler": lambda: None,
        "get_group_name": lambda: None,
        "is_compute_node": lambda: None,
    },
    is_module=True,
    impossible=lambda: "torchspan has no such pass for this torch yet",
    instead="use torchspan.passes, such as transformer_block_bucketing",
)
