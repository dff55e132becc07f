"""``torch.nn.attention.varlen``: attention over packed sequences of different lengths."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchspan.backports._base import Backport
from torchspan.backports._varlen_operators import define_operators

# S: sequences, T: tokens of all of them, L: tokens of one, H: heads, D: head dimension; q and k: of queries and of keys
_PLACE = "torch.nn.attention.varlen"


class AuxRequest(NamedTuple):
    """Which statistics to return beside the output."""

    lse: bool = False


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    return_aux: AuxRequest | None = None,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which each of several sequences, packed one after another, attends to itself only.

    Args:
        query: ``(Tq, Hq, D)``.
        key: ``(Tk, Hk, D)``; with `block_table`, pages ``(P, page size, Hk, D)``.
        value: as `key`.
        cu_seq_q: where each sequence of queries begins, and the end of the last: int32 ``(S + 1,)``.
        cu_seq_k: the same for keys; None where `seqused_k` says how many there are.
        max_q: tokens of the longest sequence of queries.
        max_k: tokens of the longest sequence of keys.
        is_causal: torch 2.10's spelling of ``window_size=(-1, 0)``.
        return_aux: ``AuxRequest(lse=True)`` returns the log of the sum of exponentials of each row of scores too.
        scale: of the scores; ``D ** -0.5`` by default.
        window_size: how many keys to the left and to the right a query sees, aligned at the ends of its sequences; -1: all.
        enable_gqa: each key and value head serves ``Hq / Hk`` query heads.
        seqused_k: how many keys of each sequence are valid: int32 ``(S,)``; for inference only.
        block_table: the pages that hold each sequence's keys and values, int32 ``(S, pages)``; for inference only.
        num_splits: 1: what the batch holds besides a sequence does not change its result by a bit.

    Returns:
        ``(Tq, Hq, D)``, and ``(Hq, Tq)`` in float32 if it was asked for.

    Raises:
        ValueError: numbers of heads that do not fit, a `window_size` that is no pair, a `scale` that is not positive.
        RuntimeError: a gradient with an argument that is for inference only.
    """
    _check(query, key, scale, window_size, enable_gqa, paged=block_table is not None)
    if is_causal and tuple(window_size) == (-1, -1):
        window_size = (-1, 0)
    out, lse, _ = torch.ops.torch_attn._varlen_attn(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        tuple(window_size) == (-1, 0),
        scale,
        list(window_size),
        enable_gqa,
        seqused_k,
        block_table,
        num_splits,
    )
    return (out, lse) if return_aux is not None and return_aux.lse else out


def varlen_attn_out(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: AuxRequest | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """What `varlen_attn` does, written to `out`, ``(Tq, Hq, D)``; it has no gradient.

    Takes and raises what `varlen_attn` does, but `is_causal`; returns `out`, and the statistics if they were asked for.
    """
    place: Any = importlib.import_module(_PLACE)  # torch's own varlen_attn, where it has that and not this
    with torch.no_grad():
        arguments = (query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
        result = place.varlen_attn(*arguments, return_aux=place.AuxRequest(lse=True), **options)
        out.copy_(result[0])
    return (out, result[1]) if return_aux is not None and return_aux.lse else out


for _public in (AuxRequest, varlen_attn, varlen_attn_out):
    _public.__module__ = _PLACE


def _check(
    query: Tensor, key: Tensor, scale: float | None, window_size: Sequence[int], enable_gqa: bool, *, paged: bool
) -> None:
    num_q, num_k = query.size(1), key.size(2 if paged else 1)
    if not enable_gqa and num_q != num_k:
        raise ValueError(
            f"query and key/value must have the same number of heads, got Hq={num_q} and Hkv={num_k}; "
            "try enable_gqa=True if groups of query heads share a key/value head"
        )
    if enable_gqa and num_q % num_k:
        raise ValueError(
            f"enable_gqa: the number of query heads must be a multiple of kv heads, got Hq={num_q} and Hkv={num_k}"
        )
    if len(window_size) != 2:
        raise ValueError(f"window_size must have length 2, got {len(window_size)}")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be greater than 0, got {scale}")


def _build() -> object:
    define_operators()
    return varlen_attn


BACKPORT = Backport(
    name="varlen_attn",
    summary="attention over packed sequences of different lengths: torch.nn.attention.varlen",
    target=_PLACE,
    since="2.10.0",
    came={"2.12.0": ("varlen_attn_out",)},
    first_forms={"2.10, 2.11": "no kernel for a CPU, and fewer arguments"},
    upstream="https://github.com/pytorch/pytorch/pull/164502",
    differs=(
        "works on a CPU too, a sequence at a time; takes is_causal (torch 2.10 to 2.12) and window_size (later); on CUDA "
        "pages are gathered first, and num_splits runs a sequence at a time"
    ),
    names={"varlen_attn": _build, "varlen_attn_out": lambda: varlen_attn_out, "AuxRequest": lambda: AuxRequest},
    is_module=True,
)
