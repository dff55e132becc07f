"""``torch.nn.attention.experimental._scaled_dot_product_attention_quantized``: attention of float8 tensors, refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchspan.backports._base import Backport

_NAMES = ("_scaled_dot_product_attention_quantized", "DescaleType")


def _none() -> Any:
    raise AssertionError("`impossible` holds on every torch that lacks it")


_build: Callable[[], object] = _none

BACKPORT = Backport(
    name="sdpa_quantized",
    summary="attention of float8 tensors: torch.nn.attention.experimental._scaled_dot_product_attention_quantized",
    target="torch.nn.attention.experimental._scaled_dot_product_attention_quantized",
    since="2.11.0",
    upstream="https://github.com/pytorch/pytorch/pull/167348",
    differs="it can be imported; its use is an error",
    names=dict.fromkeys(_NAMES, _build),
    is_module=True,
    impossible=lambda: "this torch's attention operators take no float8 tensors",
    instead="dequantize, and call torch.nn.functional.scaled_dot_product_attention",
)
