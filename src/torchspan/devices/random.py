"""Random state: draws "on the device" come from the target's generator, and so do seeds and states."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from torchspan.devices._redirect import Redirection, asked_by_torch
from torchspan.devices._wrap import Function, stand_ins
from torchspan.environment.patch import Patch, Redefinition, Replacement

WHY = "draws come from the CPU's generator"


def patches(redirection: Redirection) -> Iterable[Patch]:
    """``torch.cuda.random``, the default generators, and ``torch.Generator``."""
    yield from stand_ins("random", "torch.cuda.random", _functions(redirection))
    for name in ("manual_seed", "manual_seed_all", "seed", "seed_all"):
        yield Redefinition("random", "torch.cuda.random", name, partial(_seeding, redirection, name))
    yield Replacement("random", "torch.cuda", "default_generators", lambda old: (torch.default_generator,))
    yield Replacement("random", "torch", "Generator", partial(_generator_class, redirection), follow=True)


def _functions(redirection: Redirection) -> dict[str, Function]:
    def get_rng_state(device: Any = "cuda") -> torch.Tensor:
        redirection.index(device)
        redirection.note("torch.cuda.get_rng_state()", None, WHY)
        return torch.get_rng_state()

    def get_rng_state_all() -> list[torch.Tensor]:
        return [get_rng_state()]

    def set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
        redirection.index(device)
        redirection.note("torch.cuda.set_rng_state()", None, WHY)
        torch.set_rng_state(new_state)

    def set_rng_state_all(new_states: Iterable[torch.Tensor]) -> None:
        for state in new_states:
            set_rng_state(state)

    def initial_seed() -> int:
        return torch.initial_seed()

    return {
        "get_rng_state": get_rng_state,
        "get_rng_state_all": get_rng_state_all,
        "set_rng_state": set_rng_state,
        "set_rng_state_all": set_rng_state_all,
        "initial_seed": initial_seed,
    }


def _seeding(redirection: Redirection, name: str, old: Function) -> Function:
    """Seed the CPU's generator, unless torch.manual_seed asks, which has done or will do so itself."""

    def function(seed: int | None = None) -> None:
        if asked_by_torch():
            return
        redirection.note(f"torch.cuda.{name}()", None, WHY)
        if seed is None:
            torch.default_generator.seed()
        else:
            torch.default_generator.manual_seed(int(seed))

    return function


def _generator_class(redirection: Redirection, real: Any) -> type:
    """``torch.Generator`` whose devices are redirected; every generator is an instance of it."""

    class Meta(type(real)):  # type: ignore[misc]
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, real)

        def __subclasscheck__(cls, subclass: type) -> bool:
            return issubclass(subclass, real)

    class Generator(real, metaclass=Meta):
        __doc__ = real.__doc__

        def __new__(cls, device: Any = "cpu") -> Any:
            target = redirection.lookup(device)
            if target is None:
                return real(device=device)
            redirection.note("torch.Generator", device)
            made = real.__new__(Placed, device=target) if redirection.masquerade else real(device=target)
            if redirection.masquerade:
                made._torchspan_asked = torch.device("cuda", redirection.index(device))
            return made

    class Placed(real):
        """A generator that answers the program, never torch, for the device that it was asked for."""

        @property
        def device(self) -> torch.device:
            real_device: torch.device = real.device.__get__(self)
            return real_device if asked_by_torch() else self._torchspan_asked

    Placed.__module__, Placed.__name__, Placed.__qualname__ = "torch", "Generator", "Generator"
    Generator.__module__, Generator.__qualname__ = "torch", "Generator"
    return Generator
