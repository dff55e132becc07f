"""The allocator's segments, with or without the traces, which are no part of them."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.usefixtures("environment")


def test_segments_are_the_same_with_and_without_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = []

    def snapshot(pool: object) -> dict[str, object]:
        pools.append(pool)
        return {"segments": ["a segment"], "device_traces": ["a trace"]}

    monkeypatch.setattr(torch._C, "_cuda_memorySnapshot", snapshot, raising=False)
    for include in (True, False):
        assert torch.cuda.memory_snapshot(include_traces=include) == ["a segment"]
    assert torch.cuda.memory_snapshot((0, 1), include_traces=False) == ["a segment"]
    assert pools[-1] in ((0, 1), (0, 1, False))
