"""Symmetric memory is asked for in one place, and where there is none the error says why before anything is done."""

from __future__ import annotations

import pytest
import torch

from torchspan.core.errors import UnsupportedError
from torchspan.environment.scope import Environment


def test_it_can_be_asked_for_anywhere_and_names_torchs_own_place(environment: Environment) -> None:
    from torch.distributed.nn import SymmetricMemory

    for device in ("cpu", "cuda:64"):
        support = SymmetricMemory.query(device)
        assert not support.is_available and support.place == "torch.distributed._symmetric_memory"
        with pytest.raises(UnsupportedError, match=r"no symmetric memory here: .* collectives"):
            SymmetricMemory.empty(4, device=device)
    with pytest.raises(UnsupportedError, match="not of the device 'cpu'"):
        SymmetricMemory.rendezvous(torch.zeros(4))
    assert [decision.subject for decision in environment.report.decisions] == ["torch.distributed.nn.SymmetricMemory"]


@pytest.mark.gpu
def test_a_rank_alone_exchanges_memory_with_itself(environment: Environment) -> None:
    from torch import distributed
    from torch.distributed.nn import SymmetricMemory

    distributed.init_process_group("nccl", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        tensor = SymmetricMemory.empty(64, dtype=torch.float32, device="cuda").fill_(3)
        memory = SymmetricMemory.rendezvous(tensor)
        assert (memory.rank, memory.world_size) == (0, 1)
        assert torch.equal(memory.get_buffer(0, (64,), torch.float32), tensor)
        assert "CUDA" in SymmetricMemory.query("cuda").backends
    finally:
        distributed.destroy_process_group()


def test_a_backend_is_chosen_where_there_is_symmetric_memory_and_nowhere_else(environment: Environment) -> None:
    from torch.distributed import _symmetric_memory

    assert _symmetric_memory.get_backend(torch.device("cpu")) is None
    if torch.cuda.is_available():
        _symmetric_memory.set_backend("CUDA")
        assert _symmetric_memory.get_backend("cuda") == "CUDA"
    else:
        with pytest.raises(RuntimeError):  # torch has no allocator of this name without a GPU
            _symmetric_memory.set_backend("CUDA")
    with pytest.raises(RuntimeError):
        _symmetric_memory.set_backend("no such backend")
