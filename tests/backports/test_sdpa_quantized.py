"""Quantized attention can be imported everywhere; where torch lacks it, its use says so and what to do instead."""

from __future__ import annotations

import pytest
import torch

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.core.errors import UnsupportedError

pytestmark = pytest.mark.usefixtures("environment")

OURS = is_lacking(REGISTRY.get("sdpa_quantized").BACKPORT)


@pytest.mark.skipif(not OURS, reason="torch's own computes it, on some GPUs")
def test_its_use_is_an_error_with_the_release_and_the_way_out() -> None:
    from torch.nn.attention.experimental._scaled_dot_product_attention_quantized import (
        DescaleType,
        _scaled_dot_product_attention_quantized,
    )

    x = torch.zeros(1, 2, 4, 16)
    with pytest.raises(UnsupportedError, match=r"no float8 tensors; torch has it since 2\.11\.0; dequantize"):
        _scaled_dot_product_attention_quantized(x, x, x)
    with pytest.raises(UnsupportedError, match="DescaleType"):
        DescaleType(0)
