"""Where no graph of an XPU's work can be made, none is being captured, and to make one says why not."""

from __future__ import annotations

import pytest
import torch

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.core.errors import UnsupportedError

pytestmark = pytest.mark.usefixtures("environment")


def test_no_stream_is_capturing_and_no_graph_is_made() -> None:
    from torch.xpu.graphs import XPUGraph, graph

    assert torch.xpu.XPUGraph is XPUGraph and torch.xpu.graph is graph
    if not is_lacking(REGISTRY.get("xpu_graphs").BACKPORT):
        return  # torch's own, which needs an XPU
    assert torch.xpu.is_current_stream_capturing() is False
    with pytest.raises(UnsupportedError, match=r"torch\.xpu\.XPUGraph: .* since 2\.11\.0; run the step itself"):
        XPUGraph()
