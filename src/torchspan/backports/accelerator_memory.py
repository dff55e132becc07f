"""``torch.accelerator.memory``: the memory of whichever accelerator is here, as its own module (``torch.cuda``, …) tells it."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from types import ModuleType
from typing import Any

import torch

from torchspan.backports._base import Backport
from torchspan.core.errors import UnsupportedError

_SINCE = "2.9.0"


def _module(name: str) -> ModuleType | None:
    """The module of the accelerator that is here, which has a function `name`; None where there is no accelerator.

    Raises:
        UnsupportedError: its module has no such function.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return None
    module = torch.get_device_module(accelerator)
    if not hasattr(module, name):
        raise UnsupportedError(
            f"torch.accelerator.memory on {accelerator.type}: {module.__name__} of torch {torch.__version__} has no {name}; "
            f"expected a CUDA or XPU device, whose memory torch tells since {_SINCE}"
        )
    return module


def _index(device_index: Any) -> int:
    from torch.accelerator._utils import _get_device_index

    return int(_get_device_index(device_index, optional=True))


def empty_cache() -> None:
    """Give back memory that is cached and holds nothing; without an accelerator, nothing happens."""
    module = _module("empty_cache")
    if module is not None:
        module.empty_cache()


def empty_host_cache() -> None:
    """Give back pinned memory of the host that is cached and holds nothing."""
    if _module("empty_cache") is not None and hasattr(torch._C, "_host_emptyCache"):
        torch._C._host_emptyCache()


def memory_stats(device_index: Any = None, /) -> OrderedDict[str, Any]:
    """Figures of the allocator, by name; none without an accelerator."""
    module = _module("memory_stats")
    return OrderedDict() if module is None else OrderedDict(module.memory_stats(_index(device_index)))


def memory_allocated(device_index: Any = None, /) -> int:
    """Bytes that tensors hold."""
    return int(memory_stats(device_index).get("allocated_bytes.all.current", 0))


def max_memory_allocated(device_index: Any = None, /) -> int:
    """The most bytes that tensors held."""
    return int(memory_stats(device_index).get("allocated_bytes.all.peak", 0))


def memory_reserved(device_index: Any = None, /) -> int:
    """Bytes that the allocator holds."""
    return int(memory_stats(device_index).get("reserved_bytes.all.current", 0))


def max_memory_reserved(device_index: Any = None, /) -> int:
    """The most bytes that the allocator held."""
    return int(memory_stats(device_index).get("reserved_bytes.all.peak", 0))


def reset_accumulated_memory_stats(device_index: Any = None, /) -> None:
    """Count what is allocated and given back from 0 again."""
    module = _module("reset_accumulated_memory_stats")
    if module is not None:
        module.reset_accumulated_memory_stats(_index(device_index))


def reset_peak_memory_stats(device_index: Any = None, /) -> None:
    """Start the peaks from what is held now."""
    module = _module("reset_peak_memory_stats")
    if module is not None:
        module.reset_peak_memory_stats(_index(device_index))


def get_memory_info(device_index: Any = None, /) -> tuple[int, int]:
    """Free and total bytes of a device; raises RuntimeError, as torch does, where there is no accelerator."""
    module = _module("mem_get_info")
    if module is None:
        raise RuntimeError("Cannot access accelerator device when none is available.")
    free, total = module.mem_get_info(_index(device_index))
    return int(free), int(total)


def _snapshot(device: Any = None, augment_with_fx_traces: bool = False) -> Any:
    """What the allocator of the accelerator holds, block by block."""
    accelerator = torch.accelerator.current_accelerator()
    place = "torch.xpu.memory" if accelerator is not None and accelerator.type == "xpu" else "torch.cuda.memory"
    take = importlib.import_module(place)._snapshot
    return take(device, augment_with_fx_traces=True) if augment_with_fx_traces else take(device)


_PUBLIC = {
    "empty_cache": lambda: empty_cache,
    "empty_host_cache": lambda: empty_host_cache,
    "memory_stats": lambda: memory_stats,
    "memory_allocated": lambda: memory_allocated,
    "max_memory_allocated": lambda: max_memory_allocated,
    "memory_reserved": lambda: memory_reserved,
    "max_memory_reserved": lambda: max_memory_reserved,
    "reset_accumulated_memory_stats": lambda: reset_accumulated_memory_stats,
    "reset_peak_memory_stats": lambda: reset_peak_memory_stats,
    "get_memory_info": lambda: get_memory_info,
}

BACKPORT = Backport(
    name="accelerator_memory",
    summary="memory of the accelerator that is here: get_memory_info, memory_allocated, memory_stats, empty_cache, …",
    target="torch.accelerator.memory",
    since=_SINCE,
    came={
        "2.10.0": (
            "get_memory_info",
            "torch.accelerator.get_memory_info",
        ),
        "2.12.0": (
            "empty_host_cache",
            "torch.accelerator.empty_host_cache",
        ),
        "2.13.0": ("_snapshot",),
    },
    upstream="https://github.com/pytorch/pytorch/pull/152932",
    differs="figures are those of torch.cuda or torch.xpu; other devices are refused",
    is_module=True,
    names={
        **_PUBLIC,
        "_snapshot": lambda: _snapshot,
    },
    elsewhere={
        "torch.accelerator": {
            "memory": lambda: importlib.import_module("torch.accelerator.memory"),
            **_PUBLIC,
        }
    },
)
