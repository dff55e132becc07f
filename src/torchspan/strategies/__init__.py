"""System 1: how a Program becomes Regions, compiled inside a Budget."""

from torchspan.strategies._compile import compile_bounded, report_of
from torchspan.strategies._marks import region
from torchspan.strategies._named import partial_compile, safe_compile, smart_compile
from torchspan.strategies._replace import torch_compile_patch

__all__ = [
    "compile_bounded",
    "partial_compile",
    "region",
    "report_of",
    "safe_compile",
    "smart_compile",
    "torch_compile_patch",
]
