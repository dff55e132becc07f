"""The gradients of the fused RMS normalisation are autograd's."""

from __future__ import annotations

import pytest
import torch

from torchspan.backports._base import REGISTRY, is_lacking

BACKPORT = REGISTRY.get("missing_operators").BACKPORT

pytestmark = pytest.mark.usefixtures("environment")


@pytest.mark.skipif(not is_lacking(BACKPORT), reason="torch's own has no kernel for a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("has_weight", [True, False])
def test_the_gradients_are_autograds(dtype: torch.dtype, has_weight: bool) -> None:
    x = torch.randn(3, 4, 8, dtype=dtype).requires_grad_()
    weight = torch.randn(8, dtype=dtype).requires_grad_() if has_weight else None
    grad = torch.randn(3, 4, 8, dtype=dtype)
    torch.nn.functional.rms_norm(x, (8,), weight, 1e-5).backward(grad)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rstd = torch.rsqrt(x.detach().to(wide).square().mean(-1, keepdim=True) + 1e-5)
    arguments = (grad, x.detach(), [8], rstd, None if weight is None else weight.detach(), [True, has_weight])
    result = torch.ops.aten._fused_rms_norm_backward(*arguments)
    tolerance = {"rtol": 3e-2, "atol": 6e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(result[0], x.grad, **tolerance)
    if weight is not None:
        torch.testing.assert_close(result[1], weight.grad, **tolerance)


def test_it_is_an_operator() -> None:
    operator = torch.ops.aten._fused_rms_norm_backward.default
    assert str(operator) == "aten._fused_rms_norm_backward.default"
    x = torch.empty(2, 8, device="meta")
    assert operator(x, x, [8], x[:, :1], x[0], [True, True])[0].shape == (2, 8)
