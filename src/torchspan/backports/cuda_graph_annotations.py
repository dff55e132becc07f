"""``torch.cuda.graph_annotations``: names for what a CUDA graph captures; as on any driver that cannot, nothing is recorded."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from torchspan.backports._base import Backport, unavailable
from torchspan.core.report import current_report, user_site

_CAUSE = "this torch cannot ask a CUDA graph for its nodes"


def is_available() -> bool:
    """Whether annotations are recorded: never here, which upstream documents for older drivers."""
    return False


@contextmanager
def mark_kernels(annotation: str | dict[str, Any], *, backward: bool = True) -> Iterator[None]:
    """Annotate what is captured inside the block: nothing is recorded, and the report says so."""
    report = current_report()
    if report is not None:
        report.decide("backport", "torch.cuda.graph_annotations.mark_kernels", "nothing is recorded", _CAUSE, user_site())
    yield


def get_kernel_annotations() -> Mapping[int, list[Any]]:
    """What was recorded: nothing."""
    return MappingProxyType({})


def get_kernel_py_stacks() -> Mapping[int, str]:
    """Where kernels were launched: nothing was recorded."""
    return MappingProxyType({})


def clear_kernel_annotations() -> None:
    """Forget what was recorded: nothing was."""


BACKPORT = Backport(
    name="cuda_graph_annotations",
    summary="names for kernels in CUDA graphs: torch.cuda.graph_annotations, which records nothing here",
    target="torch.cuda.graph_annotations",
    since="2.14.0",
    came={"2.15.0": ("get_kernel_py_stacks",)},
    first_forms={"2.14": "begins to annotate kernels where the driver is missing"},
    upstream="https://github.com/pytorch/pytorch/tree/v2.14.0/torch/cuda/graph_annotations.py",
    differs="is_available() is False and nothing is recorded, as upstream has it on drivers older than CUDA 13.1",
    is_module=True,
    names={
        "is_available": lambda: is_available,
        "mark_kernels": lambda: mark_kernels,
        "get_kernel_annotations": lambda: get_kernel_annotations,
        "get_kernel_py_stacks": lambda: get_kernel_py_stacks,
        "clear_kernel_annotations": lambda: clear_kernel_annotations,
    },
    elsewhere={
        "torch.cuda": {
            "graph_annotations": lambda: importlib.import_module("torch.cuda.graph_annotations"),
            "export_dot": lambda: unavailable(
                "torch.cuda.export_dot", "this torch has no hooks around a capture", "2.14.0", "use CUDAGraph.debug_dump(path)"
            ),
            "export_graph_data": lambda: unavailable(
                "torch.cuda.export_graph_data", "this torch has no hooks around a capture", "2.14.0", "use debug_dump(path)"
            ),
        }
    },
)
