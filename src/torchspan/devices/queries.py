"""What a program asks ``torch.cuda``: whether there is a device, how many, what it is called, what it can do.

A program's code gets answers as if a GPU were here; torch's own code gets the true ones: there is none.
"""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, NamedTuple

from torchspan.devices import _redirect
from torchspan.devices._callers import asked_by_torch
from torchspan.devices._redirect import Redirection
from torchspan.devices._target import Target
from torchspan.devices._wrap import Function, stand_ins, unless_torch_asks
from torchspan.environment.facts import machine_memory
from torchspan.environment.patch import Patch, Redefinition, Replacement

CONTEXTS = "torch._dynamo.variables.ctx_manager"
CAPABILITY = (8, 0)
"""The oldest CUDA capability that computes in bfloat16, as every device here does."""


class DeviceProperties(NamedTuple):
    """What ``torch.cuda.get_device_properties`` gives for a device that stands in for a CUDA device; a tuple for dynamo."""

    name: str
    total_memory: int
    multi_processor_count: int
    major: int = CAPABILITY[0]
    minor: int = CAPABILITY[1]
    is_integrated: int = 1
    is_multi_gpu_board: int = 0
    warp_size: int = 32
    max_threads_per_multi_processor: int = 2048
    max_threads_per_block: int = 1024
    regs_per_multiprocessor: int = 65536
    shared_memory_per_block: int = 49152
    shared_memory_per_block_optin: int = 166912
    shared_memory_per_multiprocessor: int = 167936
    L2_cache_size: int = 41943040
    clock_rate: int = 1410000
    memory_clock_rate: int = 1215000
    memory_bus_width: int = 5120
    gcnArchName: str = ""
    uuid: str = "00000000-0000-0000-0000-000000000000"
    pci_bus_id: int = 0
    pci_device_id: int = 0
    pci_domain_id: int = 0


class Current(threading.local):
    """The index of the current device, by thread."""

    index = 0


class CurrentOfTarget:
    """The index of the accelerator's current device, which its module keeps."""

    def __init__(self, target: Target) -> None:
        self._target = target

    @property
    def index(self) -> int:
        """The index."""
        return self._target.current_device()

    @index.setter
    def index(self, index: int) -> None:
        self._target.set_device(index)


def patches(redirection: Redirection) -> Iterable[Patch]:
    """Every query of ``torch.cuda``, and the current device."""
    answers = {"is_available": True, "device_count": redirection.num_devices(), "is_initialized": True}
    for name, answer in answers.items():
        yield Redefinition("queries", "torch.cuda", name, partial(_answer, redirection, name, answer))
    if redirection.mode != "strict":
        yield Redefinition("queries", "torch.backends.cuda", "is_built", partial(unless_torch_asks, lambda: True))
    target = Target(redirection) if redirection.has_target_module else None
    current = Current() if target is None else CurrentOfTarget(target)
    for name, function in _properties(redirection, target).items():
        yield Redefinition("queries", "torch.cuda", name, partial(unless_torch_asks, function, name=name))
    yield from stand_ins("queries", "torch.cuda", _current(redirection, current, target))
    exchange = partial(_exchange, redirection, current)
    for name, traced in (("_exchange_device", "_exchange_fn"), ("_maybe_exchange_device", "_maybe_exchange_fn")):
        yield Replacement("queries", "torch.cuda", name, partial(exchange, name=name))
        for variable in ("CUDADeviceVariable", "AcceleratorDeviceIndexVariable"):
            yield Replacement("queries", CONTEXTS, f"{variable}.{traced}", partial(_static, partial(exchange, name=name)))
    yield Replacement("queries", "torch.cuda", "device_of.__init__", partial(_device_of))


def _answer(redirection: Redirection, name: str, answer: object, old: Function) -> Function:
    def query() -> Any:
        if asked_by_torch() or redirection.mode == "strict":
            return old()
        redirection.note(
            f"torch.cuda.{name}()", None, f"{redirection.choice.reason}; the program is told so that it goes on", str(answer)
        )
        return answer

    return query


def _properties(redirection: Redirection, target: Target | None) -> dict[str, Function]:
    @cache
    def properties() -> DeviceProperties:
        total = machine_memory().total if target is None else target.total_memory(target.current_device())
        return DeviceProperties(_name(redirection), total, os.cpu_count() or 1)

    def checked(device: Any, what: str = "device") -> int:
        """The index, or torch's error of these functions."""
        try:
            index = redirection.index(device)
        except RuntimeError as cause:
            if "invalid device ordinal" not in str(cause):
                raise
            raise AssertionError(f"Invalid {what} id") from cause
        if index < 0:
            raise AssertionError(f"Invalid {what} id")
        return index

    def get_device_properties(device: Any = None) -> DeviceProperties:
        checked(device)
        redirection.simulate("torch.cuda.get_device_properties()", "memory and cores of this machine, capability 8.0")
        return properties()

    def get_device_name(device: Any = None) -> str:
        checked(device)
        return _name(redirection)

    def get_device_capability(device: Any = None) -> tuple[int, int]:
        checked(device)
        redirection.simulate("torch.cuda.get_device_capability()", "8.0, the oldest that computes in bfloat16")
        return CAPABILITY

    def can_device_access_peer(device: Any, peer_device: Any) -> bool:
        return checked(device) != checked(peer_device, "peer device")

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return True if target is None else target.is_bf16_supported()

    def is_tf32_supported() -> bool:
        return False

    def get_arch_list() -> list[str]:
        return ["sm_80"]

    def get_gencode_flags() -> str:
        return ""

    def utilization(device: Any = None) -> int:
        redirection.index(device)
        redirection.simulate("torch.cuda.utilization()", "the load of this machine's CPU")
        import psutil

        return int(psutil.cpu_percent())

    def memory_usage(device: Any = None) -> int:
        redirection.index(device)
        redirection.simulate("torch.cuda.memory_usage()", "the memory of this machine")
        return int(machine_memory().percent)

    local = locals()
    others = ("redirection", "target", "properties", "checked")
    return {name: function for name, function in local.items() if name not in others}


def _name(redirection: Redirection) -> str:
    return f"{platform.processor() or platform.machine()} {redirection.target.upper()} (torchspan)"


def _current(redirection: Redirection, current: Current | CurrentOfTarget, target: Target | None) -> dict[str, Function]:
    def nothing(*args: Any) -> None:
        return None

    def synchronize(device: Any = None) -> None:
        index = redirection.index(device)
        if target is not None:
            target.call("synchronize", index=index)
        else:
            redirection.simulate_for_program("torch.cuda.synchronize()", "nothing here is left to wait for")

    def ipc_collect() -> None:
        redirection.simulate_for_program("torch.cuda.ipc_collect()", "no memory is shared with other processes")

    def current_device() -> int:
        return current.index

    def set_device(device: Any) -> None:
        index = redirection.index(device, is_optional=False)
        redirection.simulate_for_program("torch.cuda.set_device()", "an index that is remembered")
        if index >= 0:
            current.index = index

    def get_sync_debug_mode() -> int:
        return 0

    def set_sync_debug_mode(debug_mode: Any) -> None:
        redirection.simulate("torch.cuda.set_sync_debug_mode()", "nothing here waits for a device")

    def cudart() -> CudaRuntime:
        redirection.simulate("torch.cuda.cudart()", "the profiler's switches and the figures of memory")
        return CudaRuntime()

    return {
        "init": nothing,
        "synchronize": synchronize,
        "current_device": current_device,
        "set_device": set_device,
        "get_sync_debug_mode": get_sync_debug_mode,
        "set_sync_debug_mode": set_sync_debug_mode,
        "ipc_collect": ipc_collect,
        "_sleep": nothing,
        "cudart": cudart,
        "check_error": nothing,
    }


class CudaRuntime:
    """The part of the CUDA runtime that programs call by hand; every call succeeds."""

    def cudaProfilerStart(self) -> int:
        """Nothing to start."""
        return 0

    def cudaProfilerStop(self) -> int:
        """Nothing to stop."""
        return 0

    def cudaMemGetInfo(self, device: int = 0) -> tuple[int, int]:
        """Free and total bytes of this machine's memory."""
        memory = machine_memory()
        return memory.available, memory.total


def _exchange(redirection: Redirection, current: Current | CurrentOfTarget, old: Function, *, name: str) -> Function:
    """Make a device the current one, unless it is negative; gives the index that was current."""

    def exchange(device: int) -> int:
        if _redirect.in_force is not redirection:  # dynamo keeps what it found when it was imported
            return int(old(device))
        before = current.index
        if device is not None and device >= 0:  # None where torch was asked for the current one
            current.index = redirection.index(device)
        return before

    exchange.__module__, exchange.__name__, exchange.__qualname__ = "torch.cuda", name, name  # by which graphs find it
    return exchange


def _static(build: Callable[[Function], Function], old: Any) -> Any:
    return staticmethod(build(old.__func__ if isinstance(old, staticmethod) else old))


def _device_of(old: Any) -> Function:
    def init(self: Any, obj: Any) -> None:
        old(self, obj)
        self.idx = -1  # what the program holds is on the CPU: nothing to change

    return init
