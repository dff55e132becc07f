"""A ptxas that knows the GPU, where the one that triton brings does not: kernels keep their architecture, suffix and all.

Triton assembles for ``sm_100a`` and the like: without the suffix ``wgmma``, ``tcgen05`` and TMA are not there. Where its ptxas
is older than the GPU, another one that is installed takes its place; how old it is, it is asked.
"""

from __future__ import annotations

import functools
import importlib.util
import mmap
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torchspan.backports._base import Backport
from torchspan.core.errors import UnsupportedError
from torchspan.core.report import current_report, user_site

_PLACE = "triton.backends.nvidia.compiler"
_NEWEST = ("sm_103a", "sm_107a", "sm_110a", "sm_121a")  # of GPUs that are newer than some triton of torch 2.8 to 2.15
_chosen: dict[str, Any] = {}  # triton's description of the ptxas that is taken for an architecture


@functools.cache
def known_architectures(ptxas: str) -> frozenset[str]:
    """The architectures (``sm_90a`` …) that a ptxas says it assembles for; none if it cannot be run."""
    try:
        text = subprocess.run([ptxas, "--help"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return frozenset()
    return frozenset(re.findall(r"'(sm_\w+)'", text))


def find_ptxas(architecture: str, candidates: Iterable[str]) -> str | None:
    """The first of `candidates` that knows `architecture`, or None.

    >>> find_ptxas("sm_100a", []) is None
    True
    """
    return next((path for path in candidates if architecture in known_architectures(path)), None)


def installed_ptxas() -> Iterator[str]:
    """Paths of the ptxas programs that are installed: triton's, NVIDIA's Python packages', the CUDA toolkit's."""
    triton, nvidia = importlib.util.find_spec("triton"), importlib.util.find_spec("nvidia")
    for root in triton.submodule_search_locations or () if triton else ():
        yield from map(str, sorted(Path(root).glob("backends/nvidia/bin/ptxas*")))
    for root in nvidia.submodule_search_locations or () if nvidia else ():
        yield from map(str, sorted(Path(root).glob("*/bin/ptxas")))
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    yield from (str(Path(home, "bin", "ptxas")) for home in [*homes, "/usr/local/cuda"])
    on_path = shutil.which("ptxas")
    if on_path:
        yield on_path


def _with_ptxas_for_target(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor of triton's CUDA backend, which is made for a target before anything is compiled for it."""

    @functools.wraps(init)
    def construct(self: Any, target: Any) -> None:
        _choose(target.arch)
        init(self, target)

    return construct


def _choose(capability: int) -> None:
    """See that there is a ptxas for a GPU of this compute capability (103 is 10.3); raises UnsupportedError."""
    compiler = sys.modules[_PLACE]
    own = _ask(compiler.get_ptxas.__wrapped__, capability)
    architecture = compiler.sm_arch_from_capability(capability)
    if architecture in known_architectures(own.path):
        return
    reason = f"triton's own (CUDA {own.version}) does not know {architecture}"
    if architecture not in _chosen:
        _chosen[architecture] = _describe(architecture, own, reason)
        compiler.get_ptxas_version.cache_clear()  # it is part of the key of a compiled kernel
    report = current_report()
    if report is not None:
        report.decide("backport", f"ptxas for {architecture}", _chosen[architecture].path, reason, user_site())


def _describe(architecture: str, own: Any, reason: str) -> Any:
    """Triton's description of an installed ptxas that knows `architecture`."""
    import triton

    path = find_ptxas(architecture, installed_ptxas())
    if path is None:
        raise UnsupportedError(
            f"no ptxas here knows {architecture}: {reason}, and no other that is installed does; install the package "
            "nvidia-cuda-nvcc, or set TRITON_PTXAS_PATH to the ptxas of a newer CUDA toolkit"
        )
    if not _is_in_code_generator(architecture):  # LLVM would end the process
        raise UnsupportedError(f"triton {triton.__version__} generates no code for {architecture}; install a newer torch")
    return type(own).from_path(path)


@functools.cache
def _is_in_code_generator(architecture: str) -> bool:
    """Whether the LLVM inside triton has this processor: its name is in the library's table of names."""
    from triton._C import libtriton

    with open(libtriton.__file__, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library:
        return library.find(f"{architecture}\0".encode()) >= 0


def _ask(get_ptxas: Callable[..., Any], capability: int) -> Any:
    """Triton's ptxas for a GPU of this capability; before 3.6 it had one for all."""
    return get_ptxas(capability) if get_ptxas.__code__.co_argcount else get_ptxas()


def _with_choice(get_ptxas: Callable[..., Any]) -> Callable[..., Any]:
    """Triton's description of the ptxas to use: the chosen one, where one was chosen."""

    @functools.wraps(get_ptxas)
    def chosen(*capability: int) -> Any:
        own = get_ptxas(*capability)
        if capability:
            return _chosen.get(sys.modules[_PLACE].sm_arch_from_capability(*capability), own)
        return next(reversed(_chosen.values()), own)  # the newest ptxas serves the older GPUs too

    return chosen


def _with_newer_cuda(ptx_get_version: Callable[[str], int]) -> Callable[[str], int]:
    """The PTX version (90 is 9.0) of a CUDA release, also of releases that came after this triton."""

    def version(cuda_version: str) -> int:
        major, minor = (int(part) for part in cuda_version.split("."))
        return 90 + 10 * (major - 13) + minor if major >= 13 else ptx_get_version(cuda_version)

    return version


def _lacks(compiler: ModuleType | None) -> bool:
    if compiler is None:
        return False
    get_ptxas = getattr(compiler.get_ptxas, "__wrapped__", compiler.get_ptxas)
    return not known_architectures(_ask(get_ptxas, 100).path).issuperset(_NEWEST)


BACKPORT = Backport(
    name="triton_ptxas",
    summary="Triton kernels for GPUs that are newer than triton's own ptxas (sm_103, sm_121)",
    target=_PLACE,
    since="2.10.0",
    upstream="https://github.com/triton-lang/triton/issues/8539",
    differs="triton brings no newer ptxas: one must be installed, such as that of the package nvidia-cuda-nvcc",
    replaces={
        "CUDABackend.__init__": _with_ptxas_for_target,
        "get_ptxas": _with_choice,
        "ptx_get_version": _with_newer_cuda,
    },
    lacks=_lacks,
)
