"""Simulated ranks: on a torch that has none, programs that could use them can be imported, and use says why it fails."""

from __future__ import annotations

import pytest

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.core.errors import UnsupportedError

BACKPORT = REGISTRY.get("local_tensor").BACKPORT


@pytest.mark.usefixtures("environment")
def test_it_can_be_imported_and_its_use_says_what_to_do() -> None:
    from torch.distributed import _local_tensor

    if not is_lacking(BACKPORT):
        assert _local_tensor.LocalTensorMode(2).ranks == frozenset({0, 1})
        return
    with pytest.raises(UnsupportedError, match=r"LocalTensorMode: .* since 2\.10\.0; run real ranks"):
        _local_tensor.LocalTensorMode(2)
