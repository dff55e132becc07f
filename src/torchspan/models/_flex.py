"""FlexAttention as models call it, and the masks that it is given.

Shapes, as suffixes of names: B batch, S sequence, H query heads, K key and value heads, X width of a query or key, V width of a
value.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from torchspan.core.errors import InputError, UnsupportedError

Attention = Literal["sdpa", "flex"]
"""What computes attention: ``scaled_dot_product_attention``, or ``flex_attention``, which takes masks that depend on tokens."""

Mask = Literal["causal", "block_causal"]
"""What a position attends to: itself and what stands before it; or, of that, only what is in its document."""


def check_attention(attention: str, mask: str) -> None:
    """Raise InputError unless a model can have these."""
    if attention not in ("sdpa", "flex"):
        raise InputError(f"attention is {attention!r}; expected 'sdpa' or 'flex'")
    if mask not in ("causal", "block_causal"):
        raise InputError(f"mask is {mask!r}; expected 'causal' or 'block_causal'")
    if attention == "sdpa" and mask != "causal":
        raise InputError(f"mask is {mask!r}, which attention 'sdpa' does not take; expected attention 'flex', or mask 'causal'")


def documents_of(tokens_BS: Tensor, end_of_text: int) -> Tensor:
    """The number of each token's document in its sequence, (B, S): the token `end_of_text` is the last of a document.

    >>> import torch
    >>> documents_of(torch.tensor([[5, 9, 7, 7, 9, 1]]), end_of_text=9)
    tensor([[0, 0, 1, 1, 1, 2]])
    """
    is_end_BS = (tokens_BS == end_of_text).long()
    return is_end_BS.cumsum(1) - is_end_BS


def block_mask(tokens_BS: Tensor, mask: Mask, end_of_text: int) -> BlockMask:
    """The mask for sequences of `tokens_BS`, the same for all heads."""
    if mask == "causal":
        return create_block_mask(_causal, None, None, tokens_BS.shape[1], tokens_BS.shape[1], device=str(tokens_BS.device))
    document_BS = documents_of(tokens_BS, end_of_text)

    def block_causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_BS[batch, query] == document_BS[batch, key])

    num_sequences, num_tokens = tokens_BS.shape
    return create_block_mask(block_causal, num_sequences, None, num_tokens, num_tokens, device=str(tokens_BS.device))


def mask_of(tokens_BS: Tensor, config: Any) -> BlockMask | None:
    """What the layers of a model of `config` are given for these tokens; None where it does not use FlexAttention."""
    return block_mask(tokens_BS, config.mask, config.end_of_text) if config.attention == "flex" else None


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def attend(q_BHSX: Tensor, k_BKSX: Tensor, v_BKSV: Tensor, mask: BlockMask, scale: float | None = None) -> Tensor:
    """Attention (B, H, S, V) under `mask`; UnsupportedError where torch refuses gradients on this device."""
    grouped = q_BHSX.shape[1] != k_BKSX.shape[1]
    try:
        y_BHSV = flex_attention(q_BHSX, k_BKSX, v_BKSV, block_mask=mask, scale=scale, enable_gqa=grouped)
    except NotImplementedError as cause:
        raise UnsupportedError(
            f"{cause} torchspan makes it train on a CPU: activate it (torchspan.activate(), or 'torchspan train'), "
            "or build the model with attention='sdpa'"
        ) from cause
    assert isinstance(y_BHSV, Tensor), f"flex_attention gave a {type(y_BHSV).__name__}"
    return y_BHSV
