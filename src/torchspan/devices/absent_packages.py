"""Packages that are of use on a GPU alone, and are not installed here: who imports one is on the report, with what to do."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial
from types import FrameType

from torchspan.core.topics import Standing, Topic
from torchspan.devices._redirect import Redirection
from torchspan.environment.patch import AbsentModule, Patch

_ASKED_FOR_CUDA = (
    "its kernels are for GPUs; with --device off (TORCHSPAN_DEVICE=off) a program that has a way for CPUs takes that"
)

ADVICE = {
    "triton": "its kernels are for GPUs; 'pip install triton' has them run here by Triton's interpreter, slowly (torchspan "
    "turns it on), or write them with torch's operators",
    "flash_attn": "torch.nn.functional.scaled_dot_product_attention computes the same on every device",
    "xformers": "torch.nn.functional.scaled_dot_product_attention stands for its attention on every device",
    "apex": "torch.amp and torch.nn have what it brought",
    "transformer_engine": "torch.nn's layers under torch.autocast run on every device",
    "cupy": "numpy has the same functions for the CPU",
    "pycuda": "its kernels are for NVIDIA's compiler: write them with torch's operators",
    "sgl_kernel": _ASKED_FOR_CUDA,
    "flashinfer": _ASKED_FOR_CUDA,
    "deep_gemm": _ASKED_FOR_CUDA,
    "cutlass": _ASKED_FOR_CUDA,
    "pynvml": "'torchspan run --masquerade' answers it",
}
"""By the package: what to do where it is not there."""


def advice(module: str) -> str | None:
    """One line for who lacks the module, if it is of such a package.

    >>> advice("flash_attn.layers")
    'flash_attn is not installed here: torch.nn.functional.scaled_dot_product_attention computes the same on every device'
    >>> advice("yaml") is None
    True
    """
    package = module.partition(".")[0]
    return f"{package} is not installed here: {ADVICE[package]}" if package in ADVICE else None


def patches(redirection: Redirection) -> Iterable[Patch]:
    """One for each package."""
    for package in ADVICE:
        yield AbsentModule("absent_packages", package, partial(_tell, redirection, package))


def _tell(redirection: Redirection, package: str) -> None:
    """Put the import on the report, where it is the program's own: libraries try what is there, and go on."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and "importlib" in frame.f_code.co_filename and "util" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None or "importlib" in frame.f_code.co_filename:
        return  # importlib.util.find_spec: it was asked for, not imported
    file = frame.f_code.co_filename
    if "site-packages" in file or "dist-packages" in file:
        return
    reason = f"it is not installed here; {ADVICE[package]}"
    site = f"{file}:{frame.f_lineno}"
    redirection.report.decide(Topic.DEVICE, f"import {package}", "not found", reason, site, Standing.UNSUPPORTED)
