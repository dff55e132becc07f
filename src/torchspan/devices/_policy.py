"""What a request for a device means here: a pure function of Facts, a request and a mode."""

from __future__ import annotations

from dataclasses import dataclass

from torchspan.core.errors import InputError
from torchspan.environment.facts import Facts

ACCELERATORS = ("cuda", "xpu", "mps")
MOST_DEVICES = 16
"""As many devices as the largest common machine has: an index beyond it is a mistake, wherever the program runs."""


@dataclass(frozen=True)
class DeviceRequest:
    """What a program asked for; `index` is None where it named none."""

    kind: str
    index: int | None = None

    def __str__(self) -> str:
        return self.kind if self.index is None else f"{self.kind}:{self.index}"


@dataclass(frozen=True)
class Choice:
    """The device that a request is given, and why. `is_possible` is False for an index that no machine has."""

    device: str
    reason: str
    is_possible: bool = True


def check_mode(mode: str) -> str:
    """The `mode` itself, if it is one.

    >>> check_mode("gpu")
    Traceback (most recent call last):
    torchspan.core.errors.InputError: device is 'gpu'; expected 'auto', or a device: 'cpu', 'cuda', 'xpu', 'mps'
    """
    if mode not in ("auto", "cpu", *ACCELERATORS):
        names = ", ".join(repr(name) for name in ("cpu", *ACCELERATORS))
        raise InputError(f"device is {mode!r}; expected 'auto', or a device: {names}")
    return mode


def choose(facts: Facts, request: DeviceRequest, mode: str = "auto") -> Choice:
    """The device that `request` is given on a machine with these `facts`.

    Mode ``auto``: what was asked for where it is here, else the best accelerator that is, else the CPU. A device's name as
    the mode: that device for every request for an accelerator. The CPU stays the CPU in each.

    >>> choose(Facts(has_mps=True), DeviceRequest("cuda", 0))
    Choice(device='mps', reason='no CUDA device here; mps is the best accelerator that is', is_possible=True)
    >>> choose(Facts(), DeviceRequest("cpu")).device
    'cpu'
    """
    if request.kind not in ACCELERATORS:
        return Choice(str(request), "not an accelerator: given as asked")
    if check_mode(mode) == request.kind or (mode == "auto" and facts.has_device(request.kind)):
        return Choice(str(request), f"{request.kind} is here")
    if (request.index or 0) >= MOST_DEVICES:
        return Choice(str(request), f"no machine has {request}", is_possible=False)
    if mode != "auto":
        return Choice(mode, f"device={mode!r} was asked of torchspan")
    best = facts.accelerator()
    if best is None:
        return Choice("cpu", f"no {request.kind.upper()} device here, nor another accelerator")
    return Choice(best, f"no {request.kind.upper()} device here; {best} is the best accelerator that is")
