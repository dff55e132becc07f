"""``torch.backends`` and attention: settings that only a CUDA build takes, kernels that only a GPU has."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function, stand_ins
from torchspan.environment.patch import Patch, Redefinition, Replacement


def patches(redirection: Redirection) -> Iterable[Patch]:
    """The choice of attention kernels and of libraries, and cuFFT's plan cache."""
    yield Redefinition("backends", "torch.nn.attention", "_sdpa_kernel", partial(_attention, redirection))
    if redirection.target == "cpu":
        yield Redefinition("backends", "torch.backends.cuda", "enable_math_sdp", partial(_math_stays, redirection))
    for name in ("preferred_linalg_library", "preferred_blas_library", "preferred_rocm_fa_library"):
        yield Redefinition("backends", "torch.backends.cuda", name, partial(_preferred, redirection, name))
    yield Replacement("backends", "torch.backends.cuda", "cufft_plan_cache", lambda old: PlanCaches(old))
    yield from stand_ins("backends", "torch.backends.cuda", _workspaces(redirection))


def _math_stays(redirection: Redirection, old: Function) -> Function:
    def enable_math_sdp(enabled: bool) -> None:
        if not enabled:
            redirection.simulate("torch.backends.cuda.enable_math_sdp(False)", "the CPU has no other kernel for all inputs")
        else:
            old(enabled)

    return enable_math_sdp


def _workspaces(redirection: Redirection) -> dict[str, Function]:
    """The workspaces of CUDA's matrix libraries: their sizes are remembered."""
    kept = {"cublas": 8519680, "cublaslt": 1 << 20}

    def remember(library: str, size: int | None) -> int:
        if size is not None:
            redirection.simulate_for_program(
                f"torch.backends.cuda.{library}_workspace_size({size})", "remembered: no cuBLAS here"
            )
            kept[library] = size
        return kept[library]

    def cublas_workspace_size(size: int | None = None) -> int:
        return remember("cublas", size)

    def cublaslt_workspace_size(size: int | None = None) -> int:
        return remember("cublaslt", size)

    def blas_workspace_size(size: int | None = None, backend: Any = None) -> int:
        return remember("cublaslt" if str(backend).lower().endswith("lt") else "cublas", size)

    local = locals()
    return {name: local[name] for name in local if name.endswith("workspace_size")} | {"is_ck_sdpa_available": lambda: False}


def _attention(redirection: Redirection, old: Function) -> Function:
    """Where only kernels were allowed that a GPU has, the plain one is allowed too."""

    def _sdpa_kernel(backends: Iterable[Any], *args: Any, **kwargs: Any) -> None:
        names = [backend.name for backend in backends]
        if names and not {"MATH", "FLASH_ATTENTION", "OVERRIDEABLE"}.intersection(names):
            redirection.note(f"sdpa_kernel({', '.join(names)})", None, "there is no such kernel for the CPU", "MATH")
            backends = [*backends, type(next(iter(backends))).MATH]
        old(backends, *args, **kwargs)

    return _sdpa_kernel


def _preferred(redirection: Redirection, name: str, old: Function) -> Function:
    def preferred(backend: Any = None) -> Any:
        if backend is not None:
            redirection.leave_out(f"torch.backends.cuda.{name}({backend!r})", "nothing is set", "a CUDA library")
        return old()

    return preferred


class PlanCache:
    """A stand-in for the plan cache of one device: it remembers its limit and holds nothing."""

    size = 0

    def __init__(self) -> None:
        self.max_size = 4096

    def clear(self) -> None:
        """Nothing to clear."""


class PlanCaches(PlanCache):
    """A stand-in for ``torch.backends.cuda.cufft_plan_cache``."""

    def __init__(self, old: object) -> None:
        super().__init__()
        self._caches: dict[Any, PlanCache] = {}

    def __getitem__(self, device: Any) -> PlanCache:
        return self._caches.setdefault(device, PlanCache())
