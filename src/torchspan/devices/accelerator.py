"""``torch.accelerator``: where there is none, a program is told of the CUDA device that the other rules stand in for.

As with ``torch.cuda``, torch's own code is told the truth. Where there is another accelerator, torch's answers are right.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from torchspan.devices._redirect import Redirection, asked_by_torch
from torchspan.devices._wrap import Function
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


def patches(redirection: Redirection) -> Iterable[Patch]:
    """Every query, the current device and stream, and what is known of its memory."""
    if redirection.target.partition(":")[0] != "cpu":
        return
    for name, function in _functions(redirection).items():
        yield Redefinition("accelerator", "torch.accelerator", name, partial(_unless_torch_asks, function))
    for name in _MEMORY:
        memory = partial(_memory, name)
        yield Redefinition("accelerator", "torch.accelerator.memory", name, partial(_unless_torch_asks, memory))
    memory_info = partial(_memory, "mem_get_info")
    yield Redefinition("accelerator", "torch.accelerator.memory", "get_memory_info", partial(_unless_torch_asks, memory_info))
    yield Replacement("accelerator", "torch.accelerator", "device_index.__enter__", lambda old: _enter)
    yield Replacement("accelerator", "torch.accelerator", "device_index.__exit__", lambda old: _exit)


def _unless_torch_asks(function: Function, old: Function) -> Function:
    def query(*args: Any, **kwargs: Any) -> Any:
        return old(*args, **kwargs) if asked_by_torch() else function(*args, **kwargs)

    return query


def _functions(redirection: Redirection) -> dict[str, Function]:
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

    def current_device_index() -> int:
        return torch.cuda.current_device()

    def set_device_index(device: Any, /) -> None:
        torch.cuda.set_device(_index(device))

    def current_stream(device: Any = None, /) -> Any:
        return torch.cuda.current_stream(_index(device))

    def set_stream(stream: Any) -> None:
        torch.cuda.set_stream(stream)

    def synchronize(device: Any = None, /) -> None:
        torch.cuda.synchronize(_index(device))

    local = locals()
    return {name: function for name, function in local.items() if name not in ("redirection", "told")}


def _index(device: Any) -> Any:
    """What names a device; torch takes anything else, such as a module, for the current one."""
    return device if isinstance(device, (int, str, torch.device)) else None


def _memory(name: str, device_index: Any = None, /) -> Any:
    function = getattr(torch.cuda, name)
    return function() if name == "empty_cache" else function(_index(device_index))


def _enter(self: Any) -> None:
    if self.idx is not None:
        self.prev_idx = torch.cuda._exchange_device(self.idx)


def _exit(self: Any, *exc_info: object) -> None:
    if self.idx is not None:
        torch.cuda._maybe_exchange_device(self.prev_idx)
