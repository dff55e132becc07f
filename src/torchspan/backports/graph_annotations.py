"""``torch.cuda._graph_annotations``: names for the kernels of a CUDA graph; nothing is noted here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torchspan.backports._base import Backport, Change

_PLACE = "torch.cuda._graph_annotations"


@contextmanager
def mark_kernels(annotation: object) -> Iterator[None]:
    """Inside, kernels that are captured would be annotated; this torch notes nothing, as newer ones without CUDA 13.1."""
    yield


def get_kernel_annotations() -> dict[int, list[Any]]:
    """The annotations of captured kernels: none."""
    return {}


def _is_tools_id_unavailable() -> bool:
    """Whether kernels cannot be told apart: always."""
    return True


def _taking_annotations(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor of ``torch.cuda.graph``, with `enable_annotations`."""
    if "enable_annotations" in inspect.signature(init).parameters:
        return init

    @functools.wraps(init)
    def construct(self: Any, *args: Any, enable_annotations: bool = False, **options: Any) -> None:
        if enable_annotations:
            BACKPORT.record_use("torch.cuda.graph(enable_annotations=True): nothing is noted")
        init(self, *args, **options)

    return construct


BACKPORT = Backport(
    name="graph_annotations",
    summary="names for the kernels of a CUDA graph: torch.cuda._graph_annotations",
    target=_PLACE,
    since="2.12.0",
    first_forms={"2.12, 2.14": "does not say that the driver is missing"},
    upstream="https://github.com/pytorch/pytorch/blob/v2.12.0/torch/cuda/_graph_annotations.py",
    differs="nothing is noted, as in newer torch without the driver of CUDA 13.1",
    is_module=True,
    names={
        "mark_kernels": lambda: mark_kernels,
        "get_kernel_annotations": lambda: get_kernel_annotations,
        "_is_tools_id_unavailable": lambda: _is_tools_id_unavailable,
    },
    also=(Change("torch.cuda.graphs", "graph.__init__", _taking_annotations),),
)
