"""The switch for autograd's warning about streams can be called, and gradients are what they were."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.usefixtures("environment")


@pytest.mark.parametrize("enabled", [False, True])
def test_the_warning_can_be_switched(enabled: bool) -> None:
    from torch.autograd.graph import set_warn_on_accumulate_grad_stream_mismatch

    x = torch.ones(2, requires_grad=True)
    try:
        assert set_warn_on_accumulate_grad_stream_mismatch(enabled) is None
        (3 * x).sum().backward()
    finally:
        set_warn_on_accumulate_grad_stream_mismatch(True)
    assert torch.equal(x.grad, torch.full((2,), 3.0))
