"""A block mask from blocks of keys, without the blocks of queries where a torch can do without: attention is the same."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.core.errors import UnsupportedError

BACKPORT = REGISTRY.get("block_mask_kv_blocks").BACKPORT

pytestmark = [
    pytest.mark.usefixtures("environment"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]


def causal(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q >= k


def whole() -> BlockMask:
    return create_block_mask(causal, 1, 1, 32, 32, device="cpu", BLOCK_SIZE=16)


@pytest.mark.parametrize("compute", [True, False])
def test_attention_is_the_same(compute: bool) -> None:
    mask = whole()
    blocks = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    block_mask = BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=16, mask_mod=causal, compute_q_blocks=compute)
    q, k, v = torch.randn(3, 1, 1, 32, 16).unbind()
    assert torch.equal(flex_attention(q, k, v, block_mask=block_mask), flex_attention(q, k, v, block_mask=mask))
    assert block_mask.seq_lengths == mask.seq_lengths
    assert block_mask.q_num_blocks is None or compute or is_lacking(BACKPORT)


def test_masks_have_no_order_of_dqs_blocks_unless_asked_for() -> None:
    mask = whole()
    if not is_lacking(BACKPORT) and not hasattr(BlockMask, "_dq_kv_order"):
        pytest.skip("this torch has masks without such an order, and with compute_q_blocks")
    orders = (mask.dq_write_order, mask.dq_write_order_full, mask.dq_kv_order, mask.dq_kv_order_spt)
    assert orders == (None, None, None, None)
    blocks = (mask.kv_num_blocks, mask.kv_indices)
    BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=16, dq_write_order=None)
    if is_lacking(BACKPORT):
        with pytest.raises(UnsupportedError, match=r"BlockMask\.from_kv_blocks\(dq_write_order=…\): .* since 2\.13\.0"):
            BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=16, dq_write_order=mask.kv_indices)
        with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
            BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=16, other=None)
