"""Memory statistics: an accelerator's own where one stands in for CUDA; with a CPU alone, figures of this process.

What is allocated is what the C library has given out since the rules came into force (glibc says so exactly); elsewhere it is
the growth of the process. What is reserved is the process's resident memory.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torchspan.devices import _target_memory
from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function, stand_ins
from torchspan.environment.facts import machine_memory
from torchspan.environment.patch import Patch

WHAT = "bytes that this process has allocated since the device rules came into force"


_RESETS = (
    "reset_peak_memory_stats",
    "reset_max_memory_allocated",
    "reset_max_memory_cached",
    "reset_accumulated_memory_stats",
)
_NOTHING = {
    "empty_cache": "nothing is cached: memory is given back when its tensor dies",
    "caching_allocator_enable": "nothing is cached",
    "reset_peak_host_memory_stats": "memory of the host is not counted apart",
    "reset_accumulated_host_memory_stats": "memory of the host is not counted apart",
    "_record_memory_history": "nothing is recorded: there are no segments",
    "_dump_snapshot": "nothing is written: there are no segments",
}


class _Mallinfo2(ctypes.Structure):
    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


class Memory:
    """What this process uses, against what it used when this was made; the peak is the greatest figure that was read."""

    def __init__(self) -> None:
        self._read = _allocated_reader()
        self._base = self._read()
        self._resident_base = _resident()
        self._peak = 0

    def allocated(self) -> int:
        """Bytes now."""
        num_bytes = self._read()
        # what was there before may have been given back: else the next growth would be counted short
        self._base = min(self._base, num_bytes)
        bytes_now = num_bytes - self._base
        self._peak = max(self._peak, bytes_now)
        return bytes_now

    def peak(self) -> int:
        """The greatest number of bytes: what was read, or the growth of the resident memory's own peak."""
        self.allocated()
        return max(self._peak, _resident_peak() - self._resident_base)

    def reset_peak(self) -> None:
        """Forget the peak."""
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # Linux: the resident peak starts again from here
        self._peak = 0
        self.allocated()

    def reserved(self) -> int:
        """Bytes of resident memory."""
        return _resident()


def _allocated_reader() -> Callable[[], int]:
    library = ctypes.CDLL(None) if hasattr(ctypes, "RTLD_GLOBAL") else None
    mallinfo2 = getattr(library, "mallinfo2", None)  # glibc 2.33
    if mallinfo2 is None:
        return _resident
    mallinfo2.restype = _Mallinfo2

    def read() -> int:
        info = mallinfo2()
        return int(info.uordblks + info.hblkhd)

    return read


def _resident() -> int:
    num_bytes = _status("VmRSS")  # not psutil where that can be: it takes longer to import than the rest of an activation
    if num_bytes is None:
        import psutil

        num_bytes = psutil.Process().memory_info().rss
    return int(num_bytes)


def _resident_peak() -> int:
    return _status("VmHWM") or 0


def _status(field: str) -> int | None:
    """Bytes that Linux says of this process; None elsewhere."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(field)).split()[1]) * 1024
    return None


def patches(redirection: Redirection) -> Iterable[Patch]:
    """Every function of ``torch.cuda.memory``."""
    figures = _target_memory.functions(redirection) if redirection.has_target_module else _figures(redirection, Memory())
    yield from stand_ins("memory", "torch.cuda.memory", {**_settings(redirection), **figures, **_nested(figures)})


def _figures(redirection: Redirection, memory: Memory) -> dict[str, Function]:
    def figure(name: str, read: Callable[[], int]) -> Function:
        def function(device: Any = None) -> int:
            redirection.index(device)
            redirection.simulate_for_program(f"torch.cuda.{name}()", WHAT)
            return read()

        return function

    def memory_stats(device: Any = None) -> dict[str, Any]:
        redirection.index(device)
        redirection.simulate_for_program("torch.cuda.memory_stats()", WHAT)
        return _stats(memory)

    def memory_summary(device: Any = None, abbreviated: bool = False) -> str:
        rows = {"allocated": memory.allocated(), "peak": memory.peak(), "reserved": memory.reserved()}
        redirection.simulate_for_program("torch.cuda.memory_summary()", WHAT)
        lines = [f"{name:<10} {value / 2**20:12.1f} MiB" for name, value in rows.items()]
        return "\n".join([f"memory of this process, in place of a device's ({WHAT})", *lines])

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        redirection.index(device)
        redirection.simulate_for_program("torch.cuda.mem_get_info()", "free and total memory of this machine")
        machine = machine_memory()
        return machine.available, machine.total

    def resetting(name: str) -> Function:
        def function(device: Any = None) -> None:
            redirection.index(device)
            redirection.simulate_for_program(f"torch.cuda.{name}()", "the peak of this process's memory starts again")
            memory.reset_peak()

        return function

    figures = {
        "memory_allocated": memory.allocated,
        "max_memory_allocated": memory.peak,
        "memory_reserved": memory.reserved,
        "max_memory_reserved": lambda: max(memory.reserved(), _resident_peak()),
        "memory_cached": memory.reserved,
        "max_memory_cached": lambda: max(memory.reserved(), _resident_peak()),
    }
    return {
        **{name: figure(name, read) for name, read in figures.items()},
        "device_memory_used": figure("device_memory_used", memory.reserved),
        "memory_stats": memory_stats,
        "memory_summary": memory_summary,
        "mem_get_info": mem_get_info,
        **{name: resetting(name) for name in _RESETS},
    }


def _nested(figures: dict[str, Function]) -> dict[str, Function]:
    def memory_stats_as_nested_dict(device: Any = None) -> dict[str, Any]:
        nested: dict[str, Any] = {}
        for name, value in figures["memory_stats"](device).items():
            *path, last = name.split(".")
            place = nested
            for part in path:
                place = place.setdefault(part, {})
            place[last] = value
        return nested

    return {"memory_stats_as_nested_dict": memory_stats_as_nested_dict}


def _stats(memory: Memory) -> dict[str, Any]:
    """The names that ``torch.cuda.memory_stats`` documents; what has no counterpart is 0."""
    now, peak, reserved = memory.allocated(), memory.peak(), memory.reserved()
    figures = {
        "allocated_bytes": (now, peak),
        "active_bytes": (now, peak),
        "requested_bytes": (now, peak),
        "reserved_bytes": (reserved, max(reserved, _resident_peak())),
        **dict.fromkeys(("allocation", "segment", "active", "inactive_split", "inactive_split_bytes"), (0, 0)),
    }
    stats: dict[str, Any] = dict.fromkeys(("num_alloc_retries", "num_ooms", "num_sync_all_streams", "max_split_size"), 0)
    for name, (current, most) in figures.items():
        for pool, share in (("all", 1), ("large_pool", 0), ("small_pool", 0)):
            values = {"current": current, "peak": most, "allocated": current, "freed": 0}
            stats.update({f"{name}.{pool}.{key}": value * share for key, value in values.items()})
    return OrderedDict(sorted(stats.items()))


def _settings(redirection: Redirection) -> dict[str, Function]:
    fraction = [1.0]

    def nothing(name: str, what: str) -> Function:
        def function(*args: Any, **kwargs: Any) -> None:
            redirection.simulate_for_program(f"torch.cuda.memory.{name}()" if name[0] == "_" else f"torch.cuda.{name}()", what)

        return function

    def memory_snapshot(*args: Any, **kwargs: Any) -> list[Any]:
        redirection.simulate_for_program("torch.cuda.memory_snapshot()", "an empty list: there are no segments")
        return []

    def host_memory_stats() -> dict[str, Any]:
        return OrderedDict()

    def set_per_process_memory_fraction(fraction_: float = 1.0, device: Any = None, **named: float) -> None:
        value = named.get("fraction", fraction_)
        if not isinstance(value, float):
            raise TypeError("Invalid type for fraction argument, must be `float`")
        if not 0 <= value <= 1:
            raise ValueError(f"Invalid fraction value: {value}. Allowed range: 0~1")
        redirection.index(device)
        redirection.simulate_for_program("torch.cuda.set_per_process_memory_fraction()", "remembered, not enforced")
        fraction[0] = value

    def get_per_process_memory_fraction(device: Any = None) -> float:
        return fraction[0]

    def list_gpu_processes(device: Any = None) -> str:
        return f"GPU:{redirection.index(device)}\nno processes are running"

    def get_allocator_backend() -> str:
        return "native"

    def use_mem_pool(pool: Any = None, device: Any = None) -> Iterator[None]:
        redirection.simulate_for_program("torch.cuda.use_mem_pool()", "memory is not pooled")
        yield

    def caching_allocator_disabled() -> Iterator[None]:
        redirection.simulate_for_program("torch.cuda.caching_allocator_disabled()", "nothing is cached")
        yield

    return {
        "caching_allocator_disabled": caching_allocator_disabled,
        **{name: nothing(name, what) for name, what in _NOTHING.items()},
        "memory_snapshot": memory_snapshot,
        "_snapshot": memory_snapshot,
        "host_memory_stats": host_memory_stats,
        "host_memory_stats_as_nested_dict": host_memory_stats,
        "set_per_process_memory_fraction": set_per_process_memory_fraction,
        "get_per_process_memory_fraction": get_per_process_memory_fraction,
        "list_gpu_processes": list_gpu_processes,
        "get_allocator_backend": get_allocator_backend,
        "use_mem_pool": use_mem_pool,
    }
