"""``flex_attention(…, return_aux=AuxRequest(…))`` and ``AuxOutput``: statistics of the attention scores next to the output."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchspan.backports._base import Backport
from torchspan.private import dynamo

_PLACE = "torch.nn.attention.flex_attention"


class AuxRequest(NamedTuple):
    """Which statistics to return."""

    lse: bool = False
    max_scores: bool = False


class AuxOutput(NamedTuple):
    """The statistics that were asked for, each ``(B, H, L)``: log of the sum of exponentials, and maximum, of row scores."""

    lse: Tensor | None = None
    max_scores: Tensor | None = None


for _public in (AuxRequest, AuxOutput):
    _public.__module__ = _PLACE


def _with_aux(flex_attention: Callable[..., Any]) -> Callable[..., Any]:
    """flex_attention, with `return_aux`."""

    def with_aux(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_mod: Callable[..., Tensor] | None = None,
        block_mask: Any = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        kernel_options: dict[str, Any] | None = None,
        *,
        return_aux: AuxRequest | None = None,
    ) -> Any:
        if return_lse and return_aux is not None:
            raise ValueError("return_lse and return_aux cannot both be given; use return_aux=AuxRequest(lse=True)")
        wants_lse = return_lse if return_aux is None else return_aux.lse
        result = flex_attention(query, key, value, score_mod, block_mask, scale, enable_gqa, wants_lse, kernel_options)
        if return_aux is None:
            return result
        out, lse = result if wants_lse else (result, None)
        max_scores = _max_scores(query, key, score_mod, block_mask, scale) if return_aux.max_scores else None
        return out, AuxOutput(lse, max_scores)

    functools.update_wrapper(with_aux, flex_attention)
    del with_aux.__wrapped__  # type: ignore[attr-defined] # its signature is its own
    return with_aux


@torch.no_grad()
def _max_scores(
    query: Tensor, key: Tensor, score_mod: Callable[..., Tensor] | None, block_mask: Any, scale: float | None
) -> Tensor:
    """Each row's highest score, after `score_mod` and the mask, ``(B, Hq, L)``; no gradient flows through it."""
    precision = torch.float64 if query.dtype == torch.float64 else torch.float32
    key = key.repeat_interleave(query.size(1) // key.size(1), dim=1).expand(query.size(0), -1, -1, -1)
    scores = query.to(precision) @ key.to(precision).transpose(-2, -1)
    scores = scores * (1.0 / math.sqrt(query.size(-1)) if scale is None else scale)
    indices = [torch.arange(size, device=scores.device) for size in scores.shape]
    with dynamo.TransformGetItemToIndex():
        if score_mod is not None:
            scores = _for_each_score(score_mod, 1)(scores, *indices)
        if block_mask is not None:
            scores = scores.masked_fill(~_for_each_score(block_mask.mask_mod, 0)(*indices), -math.inf)
    return scores.amax(dim=-1)


def _for_each_score(function: Callable[..., Tensor], num_scores: int) -> Callable[..., Tensor]:
    """`function` of a score's (batch, head, query, key) indices, over all of them at once; `num_scores` scores come before."""
    for axis in reversed(range(4)):
        function = torch.vmap(function, (0,) * num_scores + tuple(0 if other == axis else None for other in range(4)))
    return function


BACKPORT = Backport(
    name="flex_attention_aux",
    summary="flex_attention(return_aux=AuxRequest(…)), AuxRequest and AuxOutput",
    target=_PLACE,
    since="2.9.0",
    upstream="https://github.com/pytorch/pytorch/pull/161667",
    differs="max_scores takes a second product of query and key, which holds all scores; it is there on a CPU too",
    names={"AuxRequest": lambda: AuxRequest, "AuxOutput": lambda: AuxOutput},
    replaces={"flex_attention": _with_aux},
)
