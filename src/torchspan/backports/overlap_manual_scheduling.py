"""``torch._inductor.fx_passes.overlap_manual_scheduling``: bucket collectives by module and reorder them."""

from __future__ import annotations

from torchspan.backports._base import Backport

BACKPORT = Backport(
    name="overlap_manual_scheduling",
    summary="bucket collectives by module and reorder them: torch._inductor.fx_passes.overlap_manual_scheduling",
    target="torch._inductor.fx_passes.overlap_manual_scheduling",
    since="2.10.0",
    upstream="https://github.com/pytorch/pytorch/pull/165487",
    names={
        "manual_overlap_bucketing": lambda: None,
        "ManualOverlapScheduler": lambda: None,
    },
    is_module=True,
    impossible=lambda: "torchspan has no such pass for this torch yet",
    instead="use torchspan.passes, such as transformer_block_bucketing",
)
