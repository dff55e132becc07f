"""The module of the accelerator that stands in for CUDA (``torch.xpu``, ``torch.mps``, that of a package): it is asked what
``torch.cuda`` is asked.

Modules differ in what they have and in how they call it. What one has not is worked out of what it has, or left out, and the
report says so.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import Any

import torch

from torchspan.core.topics import Standing
from torchspan.devices._redirect import Redirection

_MPS = {
    "memory_allocated": "current_allocated_memory",
    "memory_reserved": "driver_allocated_memory",
    "manual_seed_all": "manual_seed",
    "seed_all": "seed",
}
_ALIKE = {"manual_seed_all": "manual_seed", "seed_all": "seed"}


class Target:
    """The accelerator that a Redirection gives; each method is what ``torch.cuda`` calls so."""

    def __init__(self, redirection: Redirection) -> None:
        self._redirection = redirection
        self.kind = redirection.target_kind
        self._most: Counter[tuple[str, int]] = Counter()  # the greatest figure that was read of each device, by its name

    @cached_property
    def module(self) -> Any:
        """``torch.<kind>``."""
        return torch.get_device_module(self.kind)

    def own_name(self, name: str) -> str:
        """What the module calls what ``torch.cuda`` calls `name`; "" where it has nothing for it."""
        names = (_MPS.get(name, name) if self.kind == "mps" else name, _ALIKE.get(name, ""))
        return next((own for own in names if own and hasattr(self.module, own)), "")

    def has(self, name: str) -> bool:
        """Whether the module has something for it."""
        return self.own_name(name) != ""

    def call(self, name: str, *args: Any, index: int | None = None) -> Any:
        """Call the module's own `name`, for the device with this `index`; noted at the program's line.

        Raises:
            NotImplementedError: the module has no such function.
        """
        own = self.own_name(name)
        if not own:
            raise NotImplementedError(f"torch.{self.kind} has nothing for torch.cuda.{name}")
        self.note(name, f"torch.{self.kind}.{own}")
        function = getattr(self.module, own)
        if index is None or self.kind == "mps":
            return function(*args)
        return function(*args, self.clamped(index))

    def note(self, name: str, choice: str) -> None:
        """Count one call of ``torch.cuda.<name>()`` that went to the target."""
        self._redirection.note(f"torch.cuda.{name}()", None, self._redirection.choice.reason, choice)

    # devices

    def clamped(self, index: int) -> int:
        """The index of a device that is there: ranks of which each asks for one of its own may share the last."""
        return min(index, self.num_devices() - 1)

    def device(self, index: int) -> torch.device:
        """The device with this index."""
        return torch.device(self.kind, self.clamped(index))

    def current_device(self) -> int:
        """The index of the current device."""
        function = getattr(self.module, "current_device", None)
        return 0 if function is None else int(function())

    def set_device(self, index: int) -> None:
        """Make a device the current one; a kind of which there is one has nothing to set."""
        function = getattr(self.module, "set_device", None)
        if function is not None and index < self.num_devices():
            function(index)

    def num_devices(self) -> int:
        """How many there are."""
        return max(1, self._redirection.facts.num_devices(self.kind))

    def is_bf16_supported(self) -> bool:
        """Whether the device computes in bfloat16: what its module says, else whether a sum of two numbers comes out."""
        if self.has("is_bf16_supported"):
            return bool(self.call("is_bf16_supported"))
        try:
            torch.ones(1, dtype=torch.bfloat16, device=self.kind).add_(1)
        except (RuntimeError, TypeError) as cause:
            self._redirection.note("torch.cuda.is_bf16_supported()", None, str(cause), "False")
            return False
        self.note("is_bf16_supported", "True")
        return True

    # random numbers

    def get_rng_state(self, index: int) -> torch.Tensor:
        """The state of the generator of one device."""
        state: torch.Tensor = self.call("get_rng_state", index=index)
        return state

    def set_rng_state(self, state: torch.Tensor, index: int) -> None:
        """Set it."""
        self.call("set_rng_state", state, index=index)

    def default_generators(self) -> tuple[Any, ...]:
        """The default generator of each device."""
        if self.kind == "mps":
            return (torch.mps._get_default_mps_generator(),)
        return tuple(getattr(self.module, "default_generators", ()))

    def initial_seed(self) -> int:
        """The seed of the current device."""
        if self.has("initial_seed"):
            return int(self.call("initial_seed"))
        return int(self.default_generators()[0].initial_seed())

    # memory

    def figure(self, name: str, index: int) -> int:
        """``memory_allocated``, ``memory_reserved`` or the peak of one of them, in bytes."""
        own, key = name.removeprefix("max_"), (name.removeprefix("max_"), index)
        if name != own and self.has(name):
            return int(self.call(name, index=index))
        now = int(self.call(own, index=index))
        self._most[key] = max(self._most[key], now)
        if name == own:
            return now
        self._redirection.simulate_for_program(f"torch.cuda.{name}()", "the greatest figure that was read")
        return self._most[key]

    def stats(self, index: int) -> dict[str, Any]:
        """``memory_stats``; of a module without it, the figures that it has."""
        if self.has("memory_stats"):
            return dict(self.call("memory_stats", index=index))
        allocated, peak = (self.figure(name, index) for name in ("memory_allocated", "max_memory_allocated"))
        reserved = self.figure("memory_reserved", index)
        figures = {"allocated_bytes.all": (allocated, peak), "reserved_bytes.all": (reserved, reserved)}
        return {f"{name}.{key}": n for name, both in figures.items() for key, n in zip(("current", "peak"), both)}

    def reset_peak(self, index: int) -> None:
        """Let the greatest figure start again."""
        for name in ("memory_allocated", "memory_reserved"):
            del self._most[name, index]
        if self.has("reset_peak_memory_stats"):
            self.call("reset_peak_memory_stats", index=index)
        else:
            self.note("reset_peak_memory_stats", "the greatest figure that was read starts again")

    def free_and_total(self, index: int) -> tuple[int, int]:
        """Bytes that are free, and all."""
        if self.kind == "mps":
            total = int(torch.mps.recommended_max_memory())
            return total - self.figure("memory_reserved", index), total
        free, total = self.call("mem_get_info", index=index)
        return int(free), int(total)

    def total_memory(self, index: int) -> int:
        """All bytes of a device, as its properties say, where its module tells them."""
        if hasattr(self.module, "get_device_properties"):
            total = getattr(self.module.get_device_properties(self.clamped(index)), "total_memory", None)
            if total is not None:
                return int(total)
        return self.free_and_total(index)[1]

    def leave_out(self, name: str) -> None:
        """Note that the module has nothing for ``torch.cuda.<name>()``."""
        why = f"torch.{self.kind} has nothing for it"
        self._redirection.note(f"torch.cuda.{name}()", None, why, "left out", Standing.LEFT_OUT)
