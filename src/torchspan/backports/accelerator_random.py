"""``torch.accelerator.random``: seeds and states of the generators of whichever accelerator is here."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch

from torchspan.backports._base import Backport


def _module() -> ModuleType:
    """The module of the accelerator that is here; raises RuntimeError, as torch does, where there is none."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        raise RuntimeError("Cannot access accelerator device when none is available.")
    return torch.get_device_module(accelerator)


def _index(device: Any) -> int:
    from torch.accelerator._utils import _get_device_index

    return int(_get_device_index(device, optional=True))


def initial_seed(device: Any = None, /) -> int:
    """The seed that the generator of a device began with."""
    module = _module()
    generators = getattr(module, "default_generators", ())
    index = _index(device)
    return int(generators[index].initial_seed() if index < len(generators) else module.initial_seed())


def get_rng_state(device: Any = None, /) -> torch.Tensor:
    """The state of the generator of a device: uint8[bytes]."""
    state: torch.Tensor = _module().get_rng_state(_index(device))
    return state


def get_rng_state_all() -> list[torch.Tensor]:
    """The states of the generators of every device."""
    return [get_rng_state(index) for index in range(torch.accelerator.device_count())]


BACKPORT = Backport(
    name="accelerator_random",
    summary="seeds and states of the accelerator that is here: initial_seed, get_rng_state, get_rng_state_all",
    target="torch.accelerator.random",
    since="2.14.0",
    upstream="https://github.com/pytorch/pytorch/tree/v2.14.0/torch/accelerator/random.py",
    differs="they are asked of the accelerator's own module, such as torch.cuda",
    is_module=True,
    names={
        "initial_seed": lambda: initial_seed,
        "get_rng_state": lambda: get_rng_state,
        "get_rng_state_all": lambda: get_rng_state_all,
    },
    elsewhere={"torch.accelerator": {"random": lambda: importlib.import_module("torch.accelerator.random")}},
)
