"""What a request for a device means here: a pure function of Facts, a request and a mode."""

from __future__ import annotations

from dataclasses import dataclass

from torchspan.core.errors import InputError
from torchspan.environment.facts import Facts

ACCELERATORS = ("cuda", "xpu", "mps")
FOLLOWED = "cuda-semantics"
"""The mode in which every operator is followed, so that what CUDA refuses is refused on the CPU."""
POLICIES = ("auto", "strict", "torchdevice", FOLLOWED)
KEEP_CPU = "cpu:-1"
"""How a program says, in the mode ``torchdevice``, that it means the CPU; torch knows no such device."""
MOST_DEVICES = 16
"""As many devices as the largest common machine has: an index beyond it is a mistake, wherever the program runs."""


@dataclass(frozen=True)
class DeviceRequest:
    """What a program asked for: `kind` is empty where it named no device, `index` None where it named none."""

    kind: str = ""
    index: int | None = None

    def __str__(self) -> str:
        return self.kind if self.index is None else f"{self.kind}:{self.index}"


def request_of(device: str) -> DeviceRequest:
    """The request that a device's name makes; raises ValueError where its index is no number.

    >>> request_of("cuda:1"), request_of("cpu")
    (DeviceRequest(kind='cuda', index=1), DeviceRequest(kind='cpu', index=None))
    """
    kind, _, index = device.partition(":")
    return DeviceRequest(kind, int(index) if index else None)


@dataclass(frozen=True)
class Choice:
    """The device that a request is given, and why. `is_possible` is False for an index that no machine has."""

    device: str
    reason: str
    is_possible: bool = True


def check_mode(mode: str) -> str:
    """The `mode` itself, if it is one.

    >>> check_mode("gpu")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    torchspan.core.errors.InputError: device is 'gpu'; expected one of auto, strict, torchdevice, cuda-semantics, ...
    """
    if mode not in (*POLICIES, "cpu", *ACCELERATORS):
        raise InputError(f"device is {mode!r}; expected one of {', '.join((*POLICIES, 'off', 'cpu', *ACCELERATORS))}")
    return mode


def choose(facts: Facts, request: DeviceRequest, mode: str = "auto") -> Choice:
    """The device that `request` is given on a machine with these `facts`.

    Mode ``auto``: what was asked for where it is here, else the best accelerator that is, else the CPU; what asks for the CPU,
    or for nothing, is left alone. ``strict`` chooses the same: what it refuses is to act on it. ``torchdevice`` gives the best
    accelerator to what asks for the CPU and for nothing too, and the CPU for index -1. A device's name as the mode: that device
    for every request for an accelerator. ``cuda-semantics``: the CPU stands in for CUDA where that is not here.

    >>> choose(Facts(has_mps=True), DeviceRequest("cuda", 0))
    Choice(device='mps', reason='no CUDA device here; mps is the best accelerator that is', is_possible=True)
    >>> choose(Facts(), DeviceRequest("cpu")).device
    'cpu'
    """
    is_policy = check_mode(mode) in POLICIES
    best = None if mode == FOLLOWED and not facts.has_device("cuda") else facts.accelerator()
    if mode == "torchdevice" and request.kind in ("", "cpu"):
        if request.index == -1:
            return Choice("cpu", f"{KEEP_CPU!r} asks for the CPU itself")
        if best is not None:
            return Choice(best, f"device='torchdevice' gives the accelerator; {KEEP_CPU!r} would give the CPU")
    if request.kind not in ACCELERATORS:
        return Choice(str(request) or "cpu", "not an accelerator: given as asked")
    if mode == request.kind or (is_policy and best is not None and facts.has_device(request.kind)):
        return Choice(str(request), f"{request.kind} is here")
    if (request.index or 0) >= MOST_DEVICES:
        return Choice(str(request), f"no machine has {request}", is_possible=False)
    if not is_policy:
        return Choice(mode, f"device={mode!r} was asked of torchspan")
    if best is None:
        why = "" if mode == FOLLOWED else ", nor another accelerator"
        return Choice("cpu", f"no {request.kind.upper()} device here{why}")
    is_one_of_several = request.index is not None and 1 < facts.num_devices(best) > request.index
    device = f"{best}:{request.index}" if is_one_of_several else best
    return Choice(device, f"no {request.kind.upper()} device here; {best} is the best accelerator that is")
