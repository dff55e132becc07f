"""The memory of the device that is in use can be asked for where there is no NVIDIA driver."""

from __future__ import annotations

import psutil
import pytest
import torch

from torchspan.core.report import Report


@pytest.mark.parametrize("device", [None, 0, "cuda:0", torch.device("cuda", 0)], ids=str)
def test_the_memory_used_is_this_machines(redirected: Report, device: object) -> None:
    used, memory = torch.cuda.device_memory_used(device), psutil.virtual_memory()
    assert isinstance(used, int)
    assert abs(used - (memory.total - memory.available)) < memory.total // 4
    assert [decision.subject for decision in redirected.decisions] == ["torch.cuda.device_memory_used()"]


def test_an_index_that_is_not_there_is_an_error(redirected: Report) -> None:
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.cuda.device_memory_used(99)
