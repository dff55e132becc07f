"""Memory statistics where another accelerator stands in for CUDA: its own figures."""

from __future__ import annotations

from typing import Any

from torchspan.devices._redirect import Redirection
from torchspan.devices._target import Target
from torchspan.devices._wrap import Function

_FIGURES = {
    "memory_allocated": "memory_allocated",
    "max_memory_allocated": "max_memory_allocated",
    "memory_reserved": "memory_reserved",
    "max_memory_reserved": "max_memory_reserved",
    "memory_cached": "memory_reserved",
    "max_memory_cached": "max_memory_reserved",
    "device_memory_used": "memory_reserved",
}
_RESETS = (
    "reset_peak_memory_stats",
    "reset_max_memory_allocated",
    "reset_max_memory_cached",
    "reset_accumulated_memory_stats",
)


def functions(redirection: Redirection) -> dict[str, Function]:
    """What ``torch.cuda.memory`` has, of the target."""
    target = Target(redirection)
    return {
        **{name: _figure(redirection, target, own) for name, own in _FIGURES.items()},
        **{name: _reset(redirection, target) for name in _RESETS},
        **_whole(redirection, target),
    }


def _figure(redirection: Redirection, target: Target, own: str) -> Function:
    def function(device: Any = None) -> int:
        return target.figure(own, redirection.index(device))

    return function


def _reset(redirection: Redirection, target: Target) -> Function:
    def function(device: Any = None) -> None:
        target.reset_peak(redirection.index(device))

    return function


def _whole(redirection: Redirection, target: Target) -> dict[str, Function]:
    def memory_stats(device: Any = None) -> dict[str, Any]:
        return target.stats(redirection.index(device))

    def memory_summary(device: Any = None, abbreviated: bool = False) -> str:
        index = redirection.index(device)
        rows = {name: target.figure(name, index) for name in ("memory_allocated", "max_memory_allocated", "memory_reserved")}
        lines = [f"{name:<22} {value / 2**20:12.1f} MiB" for name, value in rows.items()]
        return "\n".join([f"memory of {target.kind}:{index}", *lines])

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        return target.free_and_total(redirection.index(device))

    def empty_cache() -> None:
        target.call("empty_cache")

    def set_per_process_memory_fraction(fraction: float = 1.0, device: Any = None) -> None:
        index = redirection.index(device)
        if target.has("set_per_process_memory_fraction"):
            target.call("set_per_process_memory_fraction", fraction, index=index)
        else:
            target.leave_out("set_per_process_memory_fraction")

    return {
        "memory_stats": memory_stats,
        "memory_summary": memory_summary,
        "mem_get_info": mem_get_info,
        "empty_cache": empty_cache,
        "set_per_process_memory_fraction": set_per_process_memory_fraction,
    }
