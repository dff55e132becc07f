"""The type of a memory pool's handle serves in annotations, as CUDA-graph code uses it."""

from __future__ import annotations

import typing

import pytest
import torch

pytestmark = pytest.mark.usefixtures("environment")


def test_a_handle_of_that_type_is_a_pair_of_numbers_in_annotations() -> None:
    def pool() -> torch.cuda._POOL_HANDLE:
        return torch.cuda._POOL_HANDLE((0, 1))

    assert typing.get_type_hints(pool)["return"] is torch.cuda._POOL_HANDLE
    assert pool() == (0, 1)
    assert torch.cuda._POOL_HANDLE.__supertype__ == tuple[int, int]
    assert torch.cuda._POOL_HANDLE.__module__ == "torch.cuda"
