"""Every device rule, as Patches for the machine at hand."""

from __future__ import annotations

from collections.abc import Iterable

from torchspan.core.registry import Registry
from torchspan.core.report import Report
from torchspan.devices._policy import DeviceRequest, check_mode, choose
from torchspan.environment.facts import Facts
from torchspan.environment.patch import Patch, Replacement

_OF_THE_CPU = ("amp", "factories", "labels", "movement", "serialization")  # rules for what asks for the CPU where CUDA is here
REGISTRY = Registry("torchspan.devices", "device rule")


def device_patches(
    facts: Facts, device: str = "auto", report: Report | None = None, *, masquerade: bool = False
) -> list[Patch]:
    """The Patches that make a program for a GPU run on what is here; none where what it asks for is here.

    Args:
        facts: what is here.
        device: ``auto`` for the asked device, else the best accelerator, else the CPU; or the device to use.
        report: where each redirection is recorded with the program's file and line.
        masquerade: whether tensors answer the program, never torch, as if they were on the device that it asked for.

    Raises:
        InputError: `device` is not a device.

    >>> device_patches(Facts(num_cuda=2))
    []
    """
    check_mode(device)
    has_cuda = choose(facts, DeviceRequest("cuda"), device).device == "cuda"
    if has_cuda and choose(facts, DeviceRequest("cpu"), device).device == "cpu":
        return []
    from torchspan.devices._redirect import Redirection

    redirection = Redirection(facts, device, report or Report(), masquerade=masquerade)
    switch = Replacement("devices", "torchspan.devices._redirect", "in_force", lambda old: redirection, create=True)
    return [switch, *(patch for name in (_OF_THE_CPU if has_cuda else REGISTRY.names()) for patch in _rule(name, redirection))]


def _rule(name: str, redirection: object) -> Iterable[Patch]:
    patches: Iterable[Patch] = REGISTRY.get(name).patches(redirection)
    return patches
