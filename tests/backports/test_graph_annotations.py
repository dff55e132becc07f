"""Annotations of a CUDA graph's kernels: without the driver that has them, a program that makes them runs."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.usefixtures("environment")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without CUDA")
def test_a_program_that_annotates_runs_and_has_none() -> None:
    from torch.cuda._graph_annotations import _is_tools_id_unavailable, get_kernel_annotations, mark_kernels

    with mark_kernels("a phase"):
        y = torch.ones(2) + 1
    assert torch.equal(y, torch.full((2,), 2.0))
    assert get_kernel_annotations() == {} and _is_tools_id_unavailable()
