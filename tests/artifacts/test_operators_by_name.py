"""A native library may call operators that it has no direct way to; it does so by name, from a description beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from torchspan.artifacts import load, precompile


def eigenvalues(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.eigvalsh(x) + 1


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script(_method)?` is deprecated:DeprecationWarning")
def test_a_library_calls_an_operator_by_name(tmp_path: Path) -> None:
    x = torch.eye(3) * 2 + 0.1
    artifact = precompile(eigenvalues, (x,))
    assert {name.partition(".")[2] for name in artifact.payloads} >= {"region_0_whole.so", "region_0_whole.json"}
    torch.testing.assert_close(load(artifact.save(tmp_path / "e.tspan"), eigenvalues)(x), eigenvalues(x))
