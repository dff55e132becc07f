"""Simulated ranks: on a torch that has none, programs that could use them can be imported, and use says why it fails."""

from __future__ import annotations

import pytest
import torch

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.core.errors import UnsupportedError

BACKPORT = REGISTRY.get("local_tensor").BACKPORT


@pytest.mark.usefixtures("environment")
def test_it_can_be_imported_and_its_use_says_what_to_do() -> None:
    from torch.distributed import _local_tensor

    if not is_lacking(BACKPORT):
        with _local_tensor.LocalTensorMode(2) as mode:  # torch 2.10 enters it when it is made
            assert mode.ranks == frozenset({0, 1})
        return
    for name in ("LocalTensorMode", "LocalTensor", "LocalIntNode"):
        with pytest.raises(UnsupportedError, match=rf"{name}: .* since 2\.10\.0; run real ranks"):
            getattr(_local_tensor, name)(2)


@pytest.mark.usefixtures("environment")
def test_what_runs_outside_of_a_simulation_works() -> None:
    from torch.distributed import _local_tensor
    from torch.distributed._local_tensor._c10d import wait_all
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert _local_tensor.local_tensor_mode() is None and callable(wait_all)
    with _local_tensor.maybe_disable_local_tensor_mode():
        assert _local_tensor.maybe_run_for_local_tensor(lambda x: x + 1)(2) == 3
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    try:
        assert int(_local_tensor.rank_map(lambda rank: torch.tensor(rank))) == 3
        assert int(_local_tensor.tensor_map(torch.tensor(4), lambda rank, x: x + rank)) == 7
    finally:
        torch.distributed.destroy_process_group()
