"""A group's timeout is set for later operations."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from torch import distributed

pytestmark = pytest.mark.usefixtures("environment")


def test_a_later_operation_has_the_new_timeout() -> None:
    from torch.distributed import distributed_c10d

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        distributed.set_timeout(timedelta(seconds=7))
        backend = distributed.group.WORLD._get_backend(torch.device("cpu"))
        assert backend.options._timeout == timedelta(seconds=7)
        assert distributed_c10d.set_timeout is distributed.set_timeout
    finally:
        distributed.destroy_process_group()
