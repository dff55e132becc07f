"""``torch.accelerator.Graph``: operations that are captured once and replayed, on whichever accelerator is here."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from torchspan.backports._base import Backport
from torchspan.core.errors import UnsupportedError

_CLASSES = {"cuda": ("torch.cuda", "CUDAGraph"), "xpu": ("torch.xpu", "XPUGraph")}


class Graph:
    """A graph of the current accelerator; as a context manager it captures what runs on the current stream.

    Args:
        keep_graph: whether the graph itself is kept after the capture, to be instantiated later.
        pool: the memory pool that it shares.
        capture_error_mode: which calls a capture forbids: ``default``, ``global``, ``thread_local`` or ``relaxed``.

    Raises:
        UnsupportedError: this accelerator has no graphs in this torch, or there is none.
    """

    def __init__(
        self, keep_graph: bool = False, *, pool: tuple[int, int] | None = None, capture_error_mode: str = "default"
    ) -> None:
        self._graph = _own_class()(keep_graph)
        self.graph_pool = pool
        self.capture_error_mode = capture_error_mode

    def capture_begin(self) -> None:
        """Start to capture on the current stream."""
        mode = "global" if self.capture_error_mode == "default" else self.capture_error_mode
        self._graph.capture_begin(*(() if self.graph_pool is None else (self.graph_pool,)), capture_error_mode=mode)

    def capture_end(self) -> None:
        """Stop to capture."""
        self._graph.capture_end()

    def instantiate(self) -> None:
        """Make what can be replayed, where `keep_graph` put it off."""
        self._graph.instantiate()

    def replay(self) -> None:
        """Run what was captured."""
        self._graph.replay()

    def reset(self) -> None:
        """Forget what was captured."""
        self._graph.reset()

    def pool(self) -> tuple[int, int]:
        """What another graph is given, to share this one's memory."""
        token: tuple[int, int] = self._graph.pool()
        return token

    def enable_debug_mode(self) -> None:
        """Keep what `debug_dump` writes."""
        self._graph.enable_debug_mode()

    def debug_dump(self, path: str) -> None:
        """Write the graph to a file."""
        self._graph.debug_dump(path)

    def __enter__(self) -> None:
        torch.accelerator.synchronize()
        self.capture_begin()

    def __exit__(self, *exc_info: object) -> None:
        self.capture_end()


Graph.__module__ = "torch.accelerator.graphs"


def _own_class() -> Any:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = "none" if accelerator is None else accelerator.type
    place, name = _CLASSES.get(kind, ("torch", ""))
    graph_class = getattr(torch.get_device_module(accelerator), name, None) if name else None
    if graph_class is None:
        raise UnsupportedError(
            f"torch.accelerator.Graph: the accelerator here is {kind}, and {place} of torch {torch.__version__} has no graphs "
            f"for it; expected CUDA; run the operations themselves instead of a graph's replay"
        )
    return graph_class


BACKPORT = Backport(
    name="accelerator_graphs",
    summary="graphs of the accelerator that is here: torch.accelerator.Graph, with capture and replay",
    target="torch.accelerator.graphs",
    since="2.12.0",
    upstream="https://github.com/pytorch/pytorch/tree/v2.12.0/torch/accelerator/graphs.py",
    differs="it holds a torch.cuda.CUDAGraph (torch.xpu.XPUGraph where there is one) and is no subclass of torch's own",
    is_module=True,
    names={"Graph": lambda: Graph},
    elsewhere={
        "torch.accelerator": {
            "graphs": lambda: importlib.import_module("torch.accelerator.graphs"),
            "Graph": lambda: Graph,
        }
    },
)
