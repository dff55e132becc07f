"""``create_block_mask(…, separate_full_blocks=)``: blocks that are whole are kept apart, or are blocks like others."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torchspan.backports._base import Backport
from torchspan.core.errors import UnsupportedError


def _taking(create: Callable[..., Any]) -> Callable[..., Any]:
    """create_block_mask, which takes what says how blocks are kept, and refuses the order of dQ's blocks."""

    @functools.wraps(create)
    def create_block_mask(
        *args: Any,
        separate_full_blocks: bool = True,
        compute_dq_write_order: bool = False,
        dq_kv_order: bool = True,
        **options: Any,
    ) -> Any:
        if compute_dq_write_order:
            raise UnsupportedError(
                "create_block_mask(compute_dq_write_order=True): this torch's kernels add up dQ in an order of their own; "
                "torch has it since 2.13.0; leave it False"
            )
        block_mask = create(*args, **options)
        return block_mask if separate_full_blocks else _as_partial(block_mask)

    return create_block_mask


def _as_partial(block_mask: Any) -> Any:
    """A mask whose whole blocks are asked of its `mask_mod` as the others are."""
    from torch.nn.attention.flex_attention import _create_sparse_block_from_block_mask

    blocks = (block_mask.to_dense(), None)
    return _create_sparse_block_from_block_mask(blocks, block_mask.mask_mod, block_mask.seq_lengths, *block_mask.BLOCK_SIZE)


def _lacks(module: ModuleType | None) -> bool:
    return module is None or "separate_full_blocks" not in inspect.signature(module.create_block_mask).parameters


BACKPORT = Backport(
    name="create_block_mask",
    summary="create_block_mask(separate_full_blocks=…): whole blocks kept apart, or not",
    target="torch.nn.attention.flex_attention",
    since="2.13.0",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/attention/flex_attention.py",
    differs="compute_dq_write_order=True is refused",
    redefines={"create_block_mask": _taking},
    lacks=_lacks,
)
