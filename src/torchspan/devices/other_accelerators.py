"""``torch.mps`` and ``torch.xpu``: where they are redirected to the CPU, a program for them finds what ``torch.cuda`` gives.

Whether there is such a device is answered with the truth. No machine has two kinds, and programs take "MPS is here" for "this
is a Mac": one that asks for several kinds is sent to CUDA, which the other rules stand in for, and one that asks for this kind
alone and else takes the CPU is where it would be sent. What names the kind without asking is served.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from torchspan.devices._callers import asked_by_torch
from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function
from torchspan.environment.patch import Patch, Redefinition, Replacement

OWNER = "other_accelerators"
_MPS = {
    "synchronize": "synchronize",
    "empty_cache": "empty_cache",
    "manual_seed": "manual_seed",
    "seed": "seed",
    "get_rng_state": "get_rng_state",
    "set_rng_state": "set_rng_state",
    "set_per_process_memory_fraction": "set_per_process_memory_fraction",
    "current_allocated_memory": "memory_allocated",
    "driver_allocated_memory": "memory_reserved",
    "current_stream": "current_stream",
    "default_stream": "default_stream",
    "set_stream": "set_stream",
}
_XPU = {
    "torch.xpu": (
        "init",
        "synchronize",
        "current_device",
        "set_device",
        "get_device_name",
        "get_device_properties",
        "get_device_capability",
        "is_bf16_supported",
        "can_device_access_peer",
        "current_stream",
        "set_stream",
        "utilization",
        "memory_usage",
    ),
    "torch.xpu.random": (
        "manual_seed",
        "manual_seed_all",
        "seed",
        "seed_all",
        "get_rng_state",
        "get_rng_state_all",
        "set_rng_state",
        "set_rng_state_all",
        "initial_seed",
    ),
    "torch.xpu.memory": (
        "empty_cache",
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
        "memory_stats",
        "memory_stats_as_nested_dict",
        "mem_get_info",
        "reset_peak_memory_stats",
        "reset_accumulated_memory_stats",
        "set_per_process_memory_fraction",
        "get_per_process_memory_fraction",
    ),
}


def patches(redirection: Redirection) -> Iterable[Patch]:
    """The calls of each kind that is not here; nothing where they go to another accelerator."""
    if redirection.target_kind != "cpu":
        return
    if "mps" in redirection.kinds:
        for name, counterpart in _MPS.items():
            yield Redefinition(OWNER, "torch.mps", name, partial(_given, redirection, f"mps.{name}", counterpart))
        yield Redefinition(OWNER, "torch.mps", "recommended_max_memory", partial(_all_memory, redirection))
        yield Replacement(OWNER, "torch.mps.event", "Event.__new__", partial(_instance, redirection, "mps.Event"))
        for name in ("start", "stop"):
            yield Redefinition(OWNER, "torch.mps.profiler", name, partial(_nothing, redirection, name))
    if "xpu" in redirection.kinds:
        for module, names in _XPU.items():
            for name in names:
                yield Redefinition(OWNER, module, name, partial(_given, redirection, f"xpu.{name}", name))
        for name in ("Stream", "Event"):
            replacement = partial(_instance, redirection, f"xpu.{name}")
            yield Replacement(OWNER, "torch.xpu.streams", f"{name}.__new__", replacement)
        for name in ("_exchange_device", "_maybe_exchange_device"):
            yield Replacement(OWNER, "torch.xpu", name, partial(_named, name))


def _given(redirection: Redirection, name: str, counterpart: str, old: Function) -> Function:
    """What ``torch.cuda`` gives for it, counted by its own name."""

    def function(*args: Any, **kwargs: Any) -> Any:
        if asked_by_torch():
            return old(*args, **kwargs)
        redirection.simulate(f"torch.{name}()", f"as torch.cuda.{counterpart}() is")
        with redirection.quiet():
            return getattr(torch.cuda, counterpart)(*args, **kwargs)

    return function


def _all_memory(redirection: Redirection, old: Function) -> Function:
    def recommended_max_memory() -> int:
        redirection.simulate("torch.mps.recommended_max_memory()", "the memory of this machine")
        with redirection.quiet():
            return torch.cuda.mem_get_info()[1]

    return recommended_max_memory


def _nothing(redirection: Redirection, name: str, old: Function) -> Function:
    def function(*args: Any, **kwargs: Any) -> None:
        redirection.simulate(f"torch.mps.profiler.{name}()", "there are no signposts to write")

    return function


def _instance(redirection: Redirection, name: str, old: object) -> staticmethod[..., Any]:
    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        redirection.simulate(f"torch.{name}()", "work is done when it is asked for, in that order")
        with redirection.quiet():
            return getattr(torch.cuda, name.partition(".")[2])(*args, **kwargs)

    return staticmethod(new)


def _named(name: str, old: object) -> Any:
    return lambda device: getattr(torch.cuda, name)(device)
