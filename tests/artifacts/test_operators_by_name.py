"""A native library may call operators that it has no direct way to; it does so by name, from a description beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def test_every_namespace_of_operators_that_torch_brings_is_known_to_compute_or_is_refused(run_python: Any) -> None:
    run_python("""
        import torch
        from torchspan.artifacts.instructions import _NAMESPACES, _OF_TORCH
        registered = {name.partition("::")[0] for name in torch._C._dispatch_get_all_op_names()}
        assert registered <= {*_NAMESPACES, *_OF_TORCH}, registered - {*_NAMESPACES, *_OF_TORCH}
    """)
