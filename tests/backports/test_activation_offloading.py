"""Activations go to the CPU and come back with their values; shapes and strides are known without running."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from torchspan.backports._base import REGISTRY, is_lacking

BACKPORT = REGISTRY.get("activation_offloading").BACKPORT

pytestmark = pytest.mark.usefixtures("environment")


def test_shapes_and_strides_are_known_without_running() -> None:
    import torch._functorch._activation_offloading.offload_ops

    with FakeTensorMode():
        x = torch.empty(3, 4, device="cuda").t()
        there = torch.ops.ao.wait_tensor(torch.ops.ao.offload(x), x)
        assert (there.device.type, there.shape, there.is_contiguous()) == ("cpu", (4, 3), True)
        back = torch.ops.ao.wait_tensor(torch.ops.ao.reload(there, torch.device("cuda"), [4, 3], [1, 4]), there)
        assert (back.device.type, back.shape, back.stride()) == ("cuda", (4, 3), (1, 4))


def test_values_come_back_and_what_was_copied_is_freed() -> None:
    from torch._functorch._activation_offloading.offload_ops import offload, reload, wait_tensor

    if not is_lacking(BACKPORT) and not torch.accelerator.is_available():
        pytest.skip("this torch's own need an accelerator")
    device = torch.device("cpu" if is_lacking(BACKPORT) else "cuda")
    x = torch.arange(12.0, device=device).view(3, 4).t()
    expected = x.clone()
    there = offload(x)
    assert wait_tensor(there, x) is there or torch.equal(there, expected.cpu())
    assert x.untyped_storage().size() == 0
    back = wait_tensor(reload(there, device, [4, 3], [1, 4]), there)
    assert torch.equal(back, expected) and back.stride() == (1, 4)
    assert there.untyped_storage().size() == 0


def test_a_wait_for_nothing_is_an_error() -> None:
    from torch._functorch._activation_offloading.offload_ops import pinned_memory_pool, wait_tensor

    with pytest.raises(RuntimeError, match="no pending transfer for tensor"):
        wait_tensor(torch.ones(2))
    with pinned_memory_pool(), pinned_memory_pool(enabled=False):
        pass
