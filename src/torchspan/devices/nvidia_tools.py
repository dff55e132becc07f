"""``nvidia-smi`` and NVML (the module ``pynvml``): on the report where a program asks them; answered with ``masquerade=True``.

What is answered is this machine's memory and load, for as many devices as the program is told of. It is opt-in, as scripts take
the tool for proof that there is a driver.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torchspan.core.topics import Standing, Topic
from torchspan.devices import _nvidia
from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function
from torchspan.environment.facts import machine_memory
from torchspan.environment.patch import MissingModule, Patch, Replacement, Variable

TOOL = "nvidia-smi"
_WHY = "NVIDIA's driver is not here; with --masquerade it is answered"
_WHAT = "memory and load of this machine"
_NOT_SUPPORTED = 3  # as NVML numbers its errors
_INVALID = 2


def patches(redirection: Redirection) -> Iterable[Patch]:
    """Commands that are the tool, and, in disguise, a tool on the PATH and a module."""
    if "cuda" not in redirection.kinds:
        return
    yield Replacement("nvidia_tools", "subprocess", "Popen.__init__", partial(_started, redirection))
    yield Replacement("nvidia_tools", "os", "system", partial(_started_by_shell, redirection))
    if not redirection.masquerade:
        return
    yield Variable("nvidia_tools", "PATH", _with_tool)
    build = partial(_nvml, redirection)
    yield MissingModule("nvidia_tools", "pynvml", build, f"NVML is not here; answered with {_WHAT}", "device")
    for name, function in build().items():  # of the real package, which finds no driver
        yield Replacement("nvidia_tools", "pynvml", name, partial(_given, function))


def _given(value: object, old: object) -> object:
    return value


# the tool


def _started(redirection: Redirection, old: Function) -> Function:
    @wraps(old)
    def init(self: Any, args: Any, *rest: Any, **kwargs: Any) -> None:
        _record(redirection, args)
        old(self, args, *rest, **kwargs)

    return init


def _started_by_shell(redirection: Redirection, old: Function) -> Function:
    @wraps(old)
    def system(command: Any) -> int:
        _record(redirection, command)
        code: int = old(command)
        return code

    return system


def _record(redirection: Redirection, args: Any) -> None:
    """Put a command that is the tool on the report: that it is not found, or that torchspan answers it."""
    parts: list[Any] = args.split() if isinstance(args, str) else list(args) if isinstance(args, (list, tuple)) else [args]
    words = [os.fsdecode(word) for word in parts if isinstance(word, (str, bytes, os.PathLike))]
    if not any(Path(word).name == TOOL for word in words):
        return
    if redirection.masquerade:
        reason = f"{_WHAT}, by a tool of torchspan's on the PATH"
        redirection.report.decide(Topic.DEVICE, TOOL, "simulated", reason, _site(), Standing.SIMULATED)
    elif shutil.which(TOOL) is None:
        redirection.report.decide(Topic.DEVICE, TOOL, "not found", _WHY, _site(), Standing.UNSUPPORTED)


def _site() -> str:
    """``file:line`` of who starts a command: of the nearest code that is neither Python's nor torchspan's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (frame.f_globals.get("__name__") or "").startswith(("torchspan.", "subprocess", "os")):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _with_tool(path: str | None) -> str:
    """The PATH with a folder at its front that has the tool; that of a parent process serves its children."""
    first = (path or "").partition(os.pathsep)[0]
    if Path(first).name.startswith("torchspan-tools-"):
        return path or ""
    folder = Path(tempfile.mkdtemp(prefix="torchspan-tools-"))
    owner = os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    tool = folder / TOOL
    source = Path(_nvidia.__file__).parents[2]
    code = f"import sys\nsys.path.insert(0, {str(source)!r})\nfrom torchspan.devices._nvidia import main\nsys.exit(main())\n"
    tool.write_text(f"#!{sys.executable}\n{code}", encoding="utf-8")
    tool.chmod(0o755)
    return f"{folder}{os.pathsep}{path}" if path else str(folder)


# NVML


class NVMLError(Exception):
    """What NVML says when it cannot; `value` is its number."""

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value

    def __str__(self) -> str:
        return {_NOT_SUPPORTED: "Not Supported", _INVALID: "Invalid Argument"}.get(self.value, f"NVML error {self.value}")


class NVMLErrorNotSupported(NVMLError):
    """What the device has no sensor for."""


def _nvml(redirection: Redirection) -> Mapping[str, object]:
    """The names of the module that programs use, by their real ones."""

    def index_of(handle: Any) -> int:
        if not isinstance(handle, SimpleNamespace):
            raise NVMLError(_INVALID)
        return int(handle.index)

    def by_index(index: int) -> SimpleNamespace:
        if not 0 <= index < _nvidia.num_devices():
            raise NVMLError(_INVALID)
        return SimpleNamespace(index=index)

    def by_uuid(uuid: str | bytes) -> SimpleNamespace:
        text = uuid.decode() if isinstance(uuid, bytes) else uuid
        return next((SimpleNamespace(index=i) for i in range(_nvidia.num_devices()) if _nvidia.uuid(i) == text), by_index(-1))

    def memory(handle: Any, version: Any = None) -> SimpleNamespace:
        index_of(handle)
        machine = machine_memory()
        return SimpleNamespace(total=machine.total, free=machine.available, used=machine.total - machine.available)

    def rates(handle: Any) -> SimpleNamespace:
        index_of(handle)
        import psutil

        return SimpleNamespace(gpu=int(psutil.cpu_percent()), memory=int(machine_memory().percent))

    def no_processes(handle: Any) -> list[Any]:
        index_of(handle)
        return []

    def not_supported(*args: Any) -> Any:
        raise NVMLErrorNotSupported(_NOT_SUPPORTED)

    def started(*args: Any) -> None:
        redirection.simulate("pynvml.nvmlInit()", _WHAT)

    major, minor = map(int, _nvidia.CUDA.split("."))
    version = major * 1000 + minor * 10
    answers: dict[str, Callable[..., object]] = {
        "nvmlInit": started,
        "nvmlInit_v2": started,
        "nvmlInitWithFlags": started,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: _nvidia.DRIVER,
        "nvmlSystemGetNVMLVersion": lambda: f"12.{_nvidia.DRIVER}",
        "nvmlSystemGetCudaDriverVersion": lambda: version,
        "nvmlSystemGetCudaDriverVersion_v2": lambda: version,
        "nvmlDeviceGetCount": _nvidia.num_devices,
        "nvmlDeviceGetCount_v2": _nvidia.num_devices,
        "nvmlDeviceGetHandleByIndex": by_index,
        "nvmlDeviceGetHandleByIndex_v2": by_index,
        "nvmlDeviceGetHandleByUUID": by_uuid,
        "nvmlDeviceGetIndex": index_of,
        "nvmlDeviceGetName": lambda handle: _nvidia.name() if index_of(handle) >= 0 else "",
        "nvmlDeviceGetUUID": lambda handle: _nvidia.uuid(index_of(handle)),
        "nvmlDeviceGetMinorNumber": index_of,
        "nvmlDeviceGetCudaComputeCapability": lambda handle: (8, 0),
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetUtilizationRates": rates,
        "nvmlDeviceGetComputeRunningProcesses": no_processes,
        "nvmlDeviceGetGraphicsRunningProcesses": no_processes,
        **dict.fromkeys(
            (
                "nvmlDeviceGetTemperature",
                "nvmlDeviceGetPowerUsage",
                "nvmlDeviceGetEnforcedPowerLimit",
                "nvmlDeviceGetPowerManagementLimit",
                "nvmlDeviceGetTotalEnergyConsumption",
                "nvmlDeviceGetFanSpeed",
                "nvmlDeviceGetClockInfo",
                "nvmlDeviceGetMaxClockInfo",
            ),
            not_supported,
        ),
    }
    errors = {"NVMLError": NVMLError, "NVMLError_NotSupported": NVMLErrorNotSupported}
    numbers = {"NVML_TEMPERATURE_GPU": 0, "NVML_CLOCK_SM": 1, "NVML_CLOCK_MEM": 2, "NVML_ERROR_NOT_SUPPORTED": _NOT_SUPPORTED}
    return {**answers, **errors, **numbers}
