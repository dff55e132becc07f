"""Random state: draws "on the device" come from the target's generator, and so do seeds and states.

Where every operator is followed (``cuda-semantics``), the device has a generator of its own; else the CPU's is both
(docs/decisions/0009).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from torchspan.devices import _target_random
from torchspan.devices._callers import asked_by_torch
from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function, stand_ins
from torchspan.environment.patch import Patch, Redefinition, Replacement

WHY = "draws come from the CPU's generator, one stream for both; device='cuda-semantics' has two"
_APART = "draws on the device come from a generator of their own"


def patches(redirection: Redirection) -> Iterable[Patch]:
    """``torch.cuda.random``, the default generators, and ``torch.Generator``."""
    yield Replacement("random", "torch", "Generator", partial(_generator_class, redirection), follow=True)
    if redirection.has_target_module:
        yield from _target_random.patches(redirection)
        return
    if redirection.follows:
        redirection.generator = _placed(redirection, "cuda:0").manual_seed(torch.initial_seed())
    yield from stand_ins("random", "torch.cuda.random", _functions(redirection))
    for name in ("manual_seed", "manual_seed_all", "seed", "seed_all"):
        yield Redefinition("random", "torch.cuda.random", name, partial(_seeding, redirection, name))
    yield Replacement("random", "torch.cuda", "default_generators", lambda old: (redirection.generator,))
    if redirection.follows:
        yield Redefinition("random", "torch.random", "fork_rng", partial(_forking, redirection))
        yield Redefinition("random", "torch.utils.checkpoint", "get_device_states", partial(_states, redirection))
        yield Redefinition("random", "torch.utils.checkpoint", "_get_device_module", partial(_module, redirection))


def _functions(redirection: Redirection) -> dict[str, Function]:
    generator, why = redirection.generator, _why(redirection)

    def get_rng_state(device: Any = "cuda") -> torch.Tensor:
        redirection.index(device)
        redirection.note("torch.cuda.get_rng_state()", None, why)
        state: torch.Tensor = generator.get_state()
        return state

    def get_rng_state_all() -> list[torch.Tensor]:
        return [get_rng_state()]

    def set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
        redirection.index(device)
        redirection.note("torch.cuda.set_rng_state()", None, why)
        generator.set_state(new_state)

    def set_rng_state_all(new_states: Iterable[torch.Tensor]) -> None:
        for state in new_states:
            set_rng_state(state)

    def initial_seed() -> int:
        return int(generator.initial_seed())

    return {
        "get_rng_state": get_rng_state,
        "get_rng_state_all": get_rng_state_all,
        "set_rng_state": set_rng_state,
        "set_rng_state_all": set_rng_state_all,
        "initial_seed": initial_seed,
    }


def _seeding(redirection: Redirection, name: str, old: Function) -> Function:
    """Seed the device's generator; where that is the CPU's, torch.manual_seed, which asks for it too, does so itself."""
    generator, why = redirection.generator, _why(redirection)

    def function(seed: int | None = None) -> None:
        is_torchs = asked_by_torch()
        if is_torchs and not redirection.follows:
            return
        if not is_torchs:
            redirection.note(f"torch.cuda.{name}()", None, why)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(int(seed))

    return function


class _Placed(torch._C.Generator):
    """A generator that answers the program, never torch, for the device that it was asked for."""

    _torchspan_asked: torch.device

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        real_device: torch.device = torch._C.Generator.device.__get__(self)
        return real_device if asked_by_torch() else self._torchspan_asked


_Placed.__module__, _Placed.__name__, _Placed.__qualname__ = "torch", "Generator", "Generator"


def _placed(redirection: Redirection, device: Any) -> Any:
    generator: Any = _Placed(device=redirection.target)
    generator._torchspan_asked = torch.device("cuda", redirection.index(device))
    redirection.generators[generator._cdata] = generator
    return generator


def _why(redirection: Redirection) -> str:
    return _APART if redirection.follows else WHY


def _forking(redirection: Redirection, old: Function) -> Function:
    """torch saves the state of the devices that it finds, which are none: the device's own is saved here."""

    def fork_rng(devices: Any = None, enabled: bool = True, *args: Any, **kwargs: Any) -> Any:
        is_forked = enabled and (devices is None or len(devices) > 0)
        before = redirection.generator.get_state() if is_forked else None
        try:
            yield from old([], enabled, *args, **kwargs)
        finally:
            if before is not None:
                redirection.generator.set_state(before)

    return fork_rng


def _states(redirection: Redirection, old: Function) -> Function:
    """``torch.utils.checkpoint`` saves the state of the devices that its arguments are on: torch is told of none."""

    def get_device_states(*args: Any) -> tuple[list[int], list[torch.Tensor]]:
        return [0], [redirection.generator.get_state()]

    return get_device_states


def _module(redirection: Redirection, old: Function) -> Function:
    """... and does so where CUDA is in use, of which it is told in ``torch.cuda._initialized``, as a GPU's driver would."""

    def _get_device_module(device: str = "cuda") -> Any:
        module = old(device)
        if device == "meta":
            return module
        return SimpleNamespace(
            _initialized=True,
            device=torch.cuda.device,
            get_rng_state=torch.cuda.get_rng_state,
            set_rng_state=torch.cuda.set_rng_state,
        )

    return _get_device_module


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
            return _placed(redirection, device) if redirection.masquerade else real(device=target)

    Generator.__module__, Generator.__qualname__ = "torch", "Generator"
    return Generator
