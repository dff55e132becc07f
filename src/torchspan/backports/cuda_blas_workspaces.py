"""``torch.backends.cuda.blas_workspace_size`` and its like: how much memory CUDA's matrix libraries may work in."""

from __future__ import annotations

import os
import re
from typing import Any

import torch

from torchspan.backports._base import Backport
from torchspan.core.errors import UnsupportedError

_KIB = 1024
_VARIABLES = {"cublas": "CUBLAS_WORKSPACE_CONFIG", "cublaslt": "CUBLASLT_WORKSPACE_SIZE"}
_DEFAULT_BYTES = {"cublas": 8519680, "cublaslt": 1024 * _KIB}  # of torch 2.8, unless the variable says otherwise
_remembered: dict[str, int] = {}


def cublas_workspace_size(size: int | None = None) -> int:
    """Bytes of cuBLAS's workspace.

    Args:
        size: bytes that it is to have. Where there is no CUDA device this is remembered, and means nothing.

    Raises:
        UnsupportedError: `size` is given and there is a CUDA device: this torch takes the size from a variable, once.
        RuntimeError: `size` is negative.
    """
    return _size("cublas", size)


def cublaslt_workspace_size(size: int | None = None) -> int:
    """Bytes of cuBLASLt's workspace; arguments and errors as of `cublas_workspace_size`."""
    return _size("cublaslt", size)


def blas_workspace_size(size: int | None = None, backend: Any = None) -> int:
    """Bytes of the workspace of a `backend`: ``cublas`` or ``cublaslt``, None for the preferred one."""
    name = str(torch.backends.cuda.preferred_blas_library() if backend is None else backend).rpartition(".")[2].lower()
    return _size("cublaslt" if name in ("cublaslt", "hipblaslt") else "cublas", size)


def is_ck_sdpa_available() -> bool:
    """Whether ROCm's composable kernels may compute attention: this torch has no such kernels to choose."""
    return False


def _size(library: str, size: int | None) -> int:
    if size is not None:
        if size < 0:
            raise RuntimeError(f"the workspace's size is {size} bytes; expected 0 or more")
        if torch.version.cuda is not None and torch._C._cuda_getDeviceCount() > 0:
            raise UnsupportedError(
                f"torch.backends.cuda.{library}_workspace_size({size}): this torch takes the size from the variable "
                f"{_VARIABLES[library]} when it is first used; {BACKPORT.reason}; set the variable before the program starts"
            )
        _remembered[library] = size
        BACKPORT.record_use(f"torch.backends.cuda.{library}_workspace_size")
    return _remembered.get(library, _given(library))


def _given(library: str) -> int:
    """What the variable says: ``:KiB:count…`` for cuBLAS, KiB for cuBLASLt."""
    text = os.environ.get(_VARIABLES[library], "")
    if library == "cublaslt":
        return int(text) * _KIB if text.isdigit() else _DEFAULT_BYTES[library]
    pairs = re.findall(r":(\d+):(\d+)", text)
    return sum(int(kib) * int(count) * _KIB for kib, count in pairs) if pairs else _DEFAULT_BYTES[library]


BACKPORT = Backport(
    name="cuda_blas_workspaces",
    summary="the workspaces of CUDA's matrix libraries (torch.backends.cuda.blas_workspace_size, …); is_ck_sdpa_available",
    target="torch.backends.cuda",
    since="2.13.0",
    came={"2.12.0": ("is_ck_sdpa_available",)},
    upstream="https://github.com/pytorch/pytorch/tree/v2.13.0/torch/backends/cuda/__init__.py",
    differs="where there is a CUDA device the sizes can be asked for, not set: this torch reads them from variables",
    names={
        "blas_workspace_size": lambda: blas_workspace_size,
        "cublas_workspace_size": lambda: cublas_workspace_size,
        "cublaslt_workspace_size": lambda: cublaslt_workspace_size,
        "is_ck_sdpa_available": lambda: is_ck_sdpa_available,
    },
)
