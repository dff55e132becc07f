"""Why the code that a backend generates could not run on a GPU: found before a compile begins, for the Report."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from torchspan.backports.triton_ptxas import installed_ptxas, known_architectures
from torchspan.environment.facts import installed_version
from torchspan.regions.settings import Settings
from torchspan.regions.signature import tensors_of

_TRITON = ("triton", "pytorch-triton", "triton-windows")  # the packages that bring it
_OLDEST = (7, 0)  # of the compute capabilities that Triton generates code for


@dataclass(frozen=True)
class Gpu:
    """The device of a call: its `kind` (``cuda``, ``cpu``, …) and, of a CUDA device, what there is to compile for it.

    `capability` is (major, minor), `triton` a version or None, `architectures` what the ptxas programs here assemble for.
    """

    kind: str
    name: str = ""
    capability: tuple[int, int] = (0, 0)
    triton: str | None = None
    architectures: frozenset[str] = frozenset()


def refusal(gpu: Gpu, settings: Settings) -> str | None:
    """Why `settings` cannot be compiled for `gpu`, and what to do; None if nothing is known to stand in the way.

    >>> refusal(Gpu("cpu"), Settings("cudagraphs"))
    'cudagraphs records the work of a CUDA device, and the inputs are on cpu; the backend inductor compiles for it'
    >>> refusal(Gpu("cuda", "GTX 1080", (6, 1), "3.4.0", frozenset({"sm_61"})), Settings())
    'inductor generates Triton kernels, which need compute capability 7.0; GTX 1080 has 6.1'
    """
    if settings.backend == "cudagraphs" and gpu.kind != "cuda":
        actual = f"the inputs are on {gpu.kind}; the backend inductor compiles for it"
        return f"cudagraphs records the work of a CUDA device, and {actual}"
    if not settings.is_inductor or gpu.kind != "cuda":
        return None
    if gpu.triton is None:
        return "inductor generates Triton kernels for a GPU, and Triton is not installed; install the package triton"
    if gpu.capability < _OLDEST:
        actual = f"{gpu.name} has {gpu.capability[0]}.{gpu.capability[1]}"
        return f"inductor generates Triton kernels, which need compute capability 7.0; {actual}"
    architecture = f"sm_{gpu.capability[0]}{gpu.capability[1]}"
    if not gpu.architectures & {architecture, f"{architecture}a"}:
        return (
            f"no ptxas here assembles for {architecture} ({gpu.name}); install the package nvidia-cuda-nvcc, or set "
            "TRITON_PTXAS_PATH to the ptxas of a newer CUDA toolkit"
        )
    return None


def gpu_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Gpu:
    """The device that a call's tensors are on; a CPU where there are none."""
    device = next((tensor.device for tensor in tensors_of(args, kwargs) if tensor.device.type not in ("cpu", "meta")), None)
    if device is None or device.type != "cuda":
        return Gpu("cpu" if device is None else device.type)
    own = [os.environ[name] for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH") if os.environ.get(name)]
    architectures = frozenset[str]().union(*map(known_architectures, [*own, *installed_ptxas()]))
    properties = torch.cuda.get_device_properties(device)
    triton = next(filter(None, map(installed_version, _TRITON)), None)
    return Gpu("cuda", properties.name, (properties.major, properties.minor), triton, architectures)
