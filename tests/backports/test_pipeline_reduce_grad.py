"""Pipelines: REDUCE_GRAD is written and read, get_mesh is taken, and parts of a block mask are those of its batches."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, nn

from torchspan.backports._base import REGISTRY, is_lacking

BACKPORT = REGISTRY.get("pipeline_reduce_grad").BACKPORT

pytestmark = [
    pytest.mark.usefixtures("environment"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]


def test_the_action_is_written_and_read() -> None:
    from torch.distributed.pipelining import schedules

    kind = schedules.REDUCE_GRAD
    if is_lacking(BACKPORT):  # how torch writes its actions changes from release to release
        assert str(kind) == "REDUCE_GRAD" and schedules._ComputationType.from_str("REDUCE_GRAD") is kind
        assert str(schedules.FORWARD) == "F"
    assert kind is schedules._ComputationType.REDUCE_GRAD
    action = schedules._Action.from_str("3REDUCE_GRAD")
    assert (action.stage_index, action.computation_type, action.microbatch_index) == (3, kind, None)
    assert schedules._Action.from_str("2UNSHARD").computation_type is schedules.UNSHARD
    assert kind not in (schedules.FORWARD, schedules.UNSHARD)


def test_a_stage_takes_get_mesh() -> None:
    from torch.distributed.pipelining import PipelineStage
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        stage = PipelineStage(nn.Linear(2, 2), 0, 2, torch.device("cpu"), get_mesh=lambda *names: None)
        assert stage.is_first
    finally:
        distributed.destroy_process_group()


def test_parts_of_a_block_mask_are_those_of_its_batches() -> None:
    from torch.distributed.pipelining.microbatch import _split_block_mask
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    limits = torch.tensor([8, 16, 24, 32])

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return k < limits[b]

    mask = create_block_mask(mask_mod, 4, 1, 32, 32, device="cpu", BLOCK_SIZE=16)
    q, k, v = torch.randn(3, 4, 1, 32, 8).unbind()
    whole = flex_attention(q, k, v, block_mask=mask)
    parts = [
        flex_attention(*(x[2 * index : 2 * index + 2] for x in (q, k, v)), block_mask=part)
        for index, part in enumerate(_split_block_mask(mask, 2))
    ]
    assert torch.equal(torch.cat(parts), whole)
    unbatched = create_block_mask(lambda b, h, q, k: q >= k, None, None, 32, 32, device="cpu", BLOCK_SIZE=16)
    assert _split_block_mask(unbatched, 3) == [unbatched, unbatched, unbatched]
    with pytest.raises(AssertionError, match="fewer batch"):
        _split_block_mask(mask, 5)
