"""Random state where another accelerator stands in for CUDA: its own generators, through its own module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch

from torchspan.devices._callers import asked_by_torch
from torchspan.devices._redirect import Redirection
from torchspan.devices._target import Target
from torchspan.devices._wrap import Function, stand_ins
from torchspan.environment.patch import Patch, Redefinition, Replacement


def patches(redirection: Redirection) -> Iterable[Patch]:
    """``torch.cuda.random``, the default generators, and ``fork_rng``, which looks for devices of CUDA."""
    target = Target(redirection)
    yield from stand_ins("random", "torch.cuda.random", _states(redirection, target))
    for name in ("manual_seed", "manual_seed_all", "seed", "seed_all"):
        yield Redefinition("random", "torch.cuda.random", name, partial(_seeding, target, name))
    yield Replacement("random", "torch.cuda", "default_generators", lambda old: Generators(target))
    yield Redefinition("random", "torch.random", "fork_rng", partial(_forking, redirection, target))


class Generators(Sequence[Any]):
    """The target's default generators, asked for when they are used: to ask opens the device."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def __getitem__(self, index: Any) -> Any:
        return self._target.default_generators()[index]

    def __len__(self) -> int:
        return len(self._target.default_generators())


def _states(redirection: Redirection, target: Target) -> dict[str, Function]:
    def get_rng_state(device: Any = "cuda") -> torch.Tensor:
        return target.get_rng_state(redirection.index(device))

    def get_rng_state_all() -> list[torch.Tensor]:
        return [target.get_rng_state(index) for index in range(target.num_devices())]

    def set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
        target.set_rng_state(new_state, redirection.index(device))

    def set_rng_state_all(new_states: Iterable[torch.Tensor]) -> None:
        for index, state in enumerate(new_states):
            target.set_rng_state(state, index)

    def initial_seed() -> int:
        return target.initial_seed()

    local = locals()
    return {name: function for name, function in local.items() if name not in ("redirection", "target")}


def _seeding(target: Target, name: str, old: Function) -> Function:
    """Seed the target; torch.manual_seed, which asks for CUDA's seed as well, seeds every accelerator itself."""

    def function(seed: int | None = None) -> None:
        if not asked_by_torch():
            target.call(name, *(() if seed is None else (int(seed),)))

    return function


def _forking(redirection: Redirection, target: Target, old: Function) -> Function:
    """The states of the target's devices are saved here: torch asks CUDA for them, or calls a module that takes no index."""

    def fork_rng(
        devices: Any = None,
        enabled: bool = True,
        _caller: str = "fork_rng",
        _devices_kw: str = "devices",
        device_type: str | None = None,
    ) -> Any:
        if device_type not in (None, target.kind, *redirection.kinds):
            yield from old(devices, enabled, _caller, _devices_kw, device_type)
            return
        indices = range(target.num_devices()) if devices is None else [redirection.index(device) for device in devices]
        before = {index: target.get_rng_state(index) for index in indices if enabled}
        try:
            yield from old([], enabled)
        finally:
            for index, state in before.items():
                target.set_rng_state(state, index)

    return fork_rng
