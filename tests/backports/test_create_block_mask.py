"""Whole blocks of a mask are kept apart or with the others, as the caller says, and attention is the same."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.core.errors import UnsupportedError

BACKPORT = REGISTRY.get("create_block_mask").BACKPORT

pytestmark = [
    pytest.mark.usefixtures("environment"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]


def causal(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q >= k


def test_whole_blocks_are_kept_apart_or_not() -> None:
    apart = create_block_mask(causal, None, None, 48, 48, device="cpu", BLOCK_SIZE=16, separate_full_blocks=True)
    together = create_block_mask(causal, None, None, 48, 48, "cpu", 16, separate_full_blocks=False, dq_kv_order=True)
    assert apart.kv_num_blocks.flatten().tolist() == [1, 1, 1] and apart.full_kv_num_blocks.flatten().tolist() == [0, 1, 2]
    assert together.kv_num_blocks.flatten().tolist() == [1, 2, 3] and together.full_kv_num_blocks is None
    assert together.seq_lengths == (48, 48) and together.BLOCK_SIZE == (16, 16)
    q, k, v = torch.randn(3, 1, 2, 48, 8).unbind()
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=together), flex_attention(q, k, v, block_mask=apart))


@pytest.mark.skipif(not is_lacking(BACKPORT), reason="torch has it")
def test_an_order_of_additions_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"compute_dq_write_order=True.*since 2\.13\.0"):
        create_block_mask(causal, None, None, 16, 16, "cpu", 16, compute_dq_write_order=True)
