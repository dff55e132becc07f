"""Graphs of an XPU's work, ``torch.xpu.XPUGraph`` and its like: none is being captured here, and none can be."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial

from torchspan.backports._base import Backport, unavailable

_PLACE = "torch.xpu.graphs"
_CAUSE = "this torch cannot capture the work of an XPU"


def is_current_stream_capturing() -> bool:
    """Whether a graph of the current stream's work is being captured: this torch cannot."""
    return False


@cache  # one class, by whichever name it is found
def _refused(name: str) -> type:
    return unavailable(f"torch.xpu.{name}", _CAUSE, "2.11.0", "run the step itself, without a graph")


_NAMES: dict[str, Callable[[], object]] = {
    "is_current_stream_capturing": lambda: is_current_stream_capturing,
    **{name: partial(_refused, name) for name in ("XPUGraph", "graph", "graph_pool_handle", "make_graphed_callables")},
}

BACKPORT = Backport(
    name="xpu_graphs",
    summary="graphs of an XPU's work can be asked for: torch.xpu.is_current_stream_capturing, XPUGraph, graph; none is made",
    target=_PLACE,
    since="2.11.0",
    upstream="https://github.com/pytorch/pytorch/blob/v2.11.0/torch/xpu/graphs.py",
    differs=f"{_CAUSE}: no stream is capturing, and to make a graph is an error that says so",
    is_module=True,
    names=_NAMES,
    elsewhere={"torch.xpu": {"graphs": lambda: importlib.import_module(_PLACE), **_NAMES}},
)
