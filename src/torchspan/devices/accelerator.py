"""``torch.accelerator``: where there is none, a program is told of the CUDA device that the other rules stand in for.

As with ``torch.cuda``, torch's own code is told the truth. Where there is another accelerator, torch's answers are right.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch._compile import _disable_dynamo

from torchspan.core.dtypes import dtypes_of
from torchspan.devices._callers import asked_by_torch
from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function, stand_ins, unless_torch_asks
from torchspan.environment.patch import Patch, Redefinition, Replacement

_MEMORY = (
    "empty_cache",
    "memory_stats",
    "memory_allocated",
    "max_memory_allocated",
    "memory_reserved",
    "max_memory_reserved",
    "reset_accumulated_memory_stats",
    "reset_peak_memory_stats",
)
_RANDOM = ("initial_seed", "get_rng_state", "get_rng_state_all")


def patches(redirection: Redirection) -> Iterable[Patch]:
    """Every query, the current device and stream, and what is known of its memory."""
    if redirection.target_kind != "cpu" or redirection.mode == "strict":
        return
    for name, function in _answers(redirection).items():
        yield Redefinition("accelerator", "torch.accelerator", name, partial(unless_torch_asks, function, name=name))
    yield from stand_ins("accelerator", "torch.accelerator", _current(redirection))
    for name in (*_MEMORY, "get_memory_info"):
        memory = partial(_memory, "mem_get_info" if name == "get_memory_info" else name)
        yield Redefinition("accelerator", "torch.accelerator.memory", name, partial(unless_torch_asks, memory, name=name))
    yield from stand_ins(
        "accelerator", "torch.accelerator.memory", {"empty_host_cache": partial(_empty_host_cache, redirection)}
    )
    yield from stand_ins("accelerator", "torch.accelerator.random", {name: partial(_random, name) for name in _RANDOM})
    yield Replacement("accelerator", "torch.accelerator", "device_index.__enter__", lambda old: _enter)
    yield Replacement("accelerator", "torch.accelerator", "device_index.__exit__", lambda old: _exit)
    yield Redefinition("accelerator", "torch", "get_device_module", _get_device_module)


def _answers(redirection: Redirection) -> dict[str, Function]:
    def told(name: str, answer: Any) -> Any:
        reason = f"{redirection.choice.reason}; the program is told so that it goes on"
        redirection.note(f"torch.accelerator.{name}()", None, reason, str(answer))
        return answer

    def is_available() -> bool:
        return bool(told("is_available", True))

    def device_count() -> int:
        return int(told("device_count", torch.cuda.device_count()))

    def current_accelerator(check_available: bool = False) -> torch.device:
        told("current_accelerator", "cuda")
        return torch.device("cuda")

    def get_device_capability(device: Any = None, /) -> dict[str, Any]:
        redirection.simulate("torch.accelerator.get_device_capability()", "the types of numbers that a CPU computes with")
        return {"supported_dtypes": set(dtypes_of(torch.device("cpu")))}

    return {
        "is_available": is_available,
        "device_count": device_count,
        "current_accelerator": current_accelerator,
        "get_device_capability": get_device_capability,
    }


def _current(redirection: Redirection) -> dict[str, Function]:
    """What torch asks only where there is a device, and dynamo for the program: a compiled ``synchronize()`` ends here too."""

    def current_device_index() -> int:
        return torch.cuda.current_device()

    def set_device_index(device: Any, /) -> None:
        redirection.simulate_for_program("torch.accelerator.set_device_index()", "an index that is remembered")
        torch.cuda.set_device(_index(device))

    @_disable_dynamo  # else compiled code, which asks it for the stream, would have it compiled
    def current_stream(device: Any = None, /) -> Any:
        return torch.cuda.current_stream(_index(device))

    def set_stream(stream: Any) -> None:
        torch.cuda.set_stream(stream)

    def synchronize(device: Any = None, /) -> None:
        redirection.index(_index(device))
        redirection.simulate_for_program("torch.accelerator.synchronize()", "nothing here is left to wait for")

    return {
        "current_device_index": current_device_index,
        "current_device_idx": current_device_index,
        "set_device_index": set_device_index,
        "set_device_idx": set_device_index,
        "current_stream": current_stream,
        "set_stream": set_stream,
        "synchronize": synchronize,
    }


def _index(device: Any) -> Any:
    """What names a device; torch takes anything else, such as a module, for the current one."""
    return device if isinstance(device, (int, str, torch.device)) else None


def _memory(name: str, device_index: Any = None, /) -> Any:
    function = getattr(torch.cuda, name)
    return function() if name == "empty_cache" else function(_index(device_index))


def _empty_host_cache(redirection: Redirection) -> None:
    redirection.simulate_for_program("torch.accelerator.empty_host_cache()", "memory of the host is not cached")


def _random(name: str, device: Any = None, /) -> Any:
    """What ``torch.cuda.random`` says of a device: one generator stands in for those of all."""
    if name != "get_rng_state":
        return getattr(torch.cuda, name)()
    return torch.cuda.get_rng_state("cuda" if device is None else device)


def _get_device_module(old: Function) -> Function:
    def get_device_module(device: Any = None) -> ModuleType:
        if device is None and not asked_by_torch():
            device = "cuda"
        module: ModuleType = old(device)
        return module

    return get_device_module


def _enter(self: Any) -> None:
    if self.idx is not None:
        self.prev_idx = torch.cuda._exchange_device(self.idx)


def _exit(self: Any, *exc_info: object) -> None:
    if self.idx is not None:
        torch.cuda._maybe_exchange_device(self.prev_idx)
