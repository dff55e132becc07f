"""Facts: what is true of this machine and this torch, as a value; tests give it by hand."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any


@dataclass(frozen=True)
class Facts:
    """What is here. Counts of devices are 0 where there are none; versions are None where a thing is missing.

    `other` names an accelerator that is none of torch's own kinds (its module is ``torch.<other>``), of which there are
    `num_other`. `has_float64` is False where the accelerator has no double precision; MPS never has.
    """

    python: str = "3.11.0"
    torch: str = "2.13.0"
    triton: str | None = None
    cxx: str | None = None
    num_cuda: int = 0
    num_xpu: int = 0
    has_mps: bool = False
    other: str = ""
    num_other: int = 0
    has_float64: bool = True
    num_cores: int = 1
    memory_bytes: int = 0
    platform: str = "linux"

    def has_device(self, kind: str, index: int | None = None) -> bool:
        """Whether a device of this `kind` (``cuda``, ``mps``, ``xpu``, ``cpu``) and `index` is here.

        >>> Facts(num_cuda=2).has_device("cuda", 1), Facts(num_cuda=2).has_device("cuda", 2), Facts().has_device("mps")
        (True, False, False)
        """
        return (index or 0) < self.num_devices(kind)

    def num_devices(self, kind: str) -> int:
        """How many devices of this `kind` are here."""
        known = {"cpu": 1, "cuda": self.num_cuda, "xpu": self.num_xpu, "mps": int(self.has_mps)}
        return known.get(kind, self.num_other if kind == self.other else 0)

    def accelerator(self) -> str | None:
        """The best accelerator that is here, or None.

        >>> Facts(has_mps=True).accelerator(), Facts().accelerator()
        ('mps', None)
        """
        return next((kind for kind in ("cuda", "xpu", "mps", self.other) if self.has_device(kind)), None)

    def computes_in_float64(self, kind: str) -> bool:
        """Whether a device of this `kind` has double precision.

        >>> Facts(has_mps=True).computes_in_float64("mps"), Facts().computes_in_float64("cpu")
        (False, True)
        """
        return kind in ("cpu", "cuda") or (kind != "mps" and (self.has_float64 or kind != self.accelerator()))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def gather(*, has_tools: bool = True) -> Facts:
    """The Facts of this machine; asks torch for its devices, so torch is imported.

    Without `has_tools` what takes time is not asked: `cxx` is None (the compiler is a process to start), `memory_bytes` 0.
    """
    import torch

    other, num_other = _other_accelerator()
    return Facts(
        python=platform.python_version(),
        torch=torch.__version__,
        triton=installed_version("triton"),
        cxx=_cxx_version() if has_tools else None,
        num_cuda=torch.cuda.device_count(),
        num_xpu=torch.xpu.device_count(),
        has_mps=torch.backends.mps.is_available(),
        other=other,
        num_other=num_other,
        has_float64=_has_float64(),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=machine_memory().total if has_tools else 0,
        platform=platform.system().lower(),
    )


def _other_accelerator() -> tuple[str, int]:
    """The accelerator that a package has registered with torch, and how many there are; ``("", 0)`` without one."""
    import torch

    name = torch._C._get_privateuse1_backend_name()
    module = getattr(torch, name, None)  # a package that was imported has put it there
    if module is None or not getattr(module, "is_available", lambda: False)():
        return "", 0
    return name, int(module.device_count())


def _has_float64() -> bool:
    """Whether the accelerator, if there is one, has double precision; asked of it, as torch has no table."""
    import torch

    device = torch.accelerator.current_accelerator()
    if device is None or device.type in ("cuda", "mps") or not torch.accelerator.is_available():
        return device is None or device.type != "mps"
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties().has_fp64)
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError) as cause:  # memory may be short, too, or the device in another's hands
        return re.search("float64|double|fp64", str(cause), re.IGNORECASE) is None
    return True


def machine_memory() -> Any:
    """This machine's memory, as psutil tells it: ``total``, ``available``, ``percent``, …"""
    import psutil  # here: it takes longer to import than the rest of an activation

    return psutil.virtual_memory()


def installed_version(package: str) -> str | None:
    """The version of an installed package; None where it is not installed.

    >>> installed_version("torch") is None, installed_version("no such package") is None
    (False, True)
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cxx_version() -> str | None:
    """First line of what the C++ compiler that inductor would call says of itself."""
    compiler = next((path for name in (os.environ.get("CXX"), "g++", "clang++") if name and (path := shutil.which(name))), None)
    if compiler is None:
        return None
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=10, check=False)
    return done.stdout.splitlines()[0] if done.stdout else compiler
