"""What a program may hold: the device that torchspan chose, as a value, and the scope in which the CPU means the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from torchspan.core.errors import InputError
from torchspan.devices import _redirect
from torchspan.devices._policy import choose, request_of
from torchspan.environment.facts import gather


class TorchDevice:
    """The device that a request is given here; ``device`` is an ordinary ``torch.device``.

    Args:
        device: what to ask for, such as ``cuda``; by default the best accelerator that is here, else the CPU.

    Raises:
        InputError: `device` is no device, or no machine has its index.

    >>> device = TorchDevice()
    >>> torch.nn.Linear(2, 2).to(device.device).weight.device == device.device
    True
    """

    def __init__(self, device: str | None = None) -> None:
        mode = _redirect.in_force.mode if _redirect.in_force is not None else "auto"
        facts = gather(has_tools=False)
        request = device or facts.accelerator() or "cpu"
        try:
            choice = choose(facts, request_of(request), mode)
            self.device = torch.device(choice.device)
        except (RuntimeError, ValueError) as cause:
            raise InputError(f"TorchDevice({device!r}): expected a device, such as 'cuda' or 'cuda:1': {cause}") from cause
        if not choice.is_possible:
            raise InputError(f"TorchDevice({device!r}): {choice.reason}")
        self.reason = choice.reason

    def __str__(self) -> str:
        return str(self.device)

    def __repr__(self) -> str:
        return f"TorchDevice(device={str(self.device)!r}, reason={self.reason!r})"


@contextmanager
def keep_cpu() -> Iterator[None]:
    """Inside, in this thread, what asks for the CPU is given the CPU: ``device="torchdevice"`` gives it an accelerator else.

    >>> import torchspan
    >>> with torchspan.activate(device="torchdevice"), torchspan.keep_cpu():
    ...     torch.zeros(3, device="cpu").device
    device(type='cpu')
    """
    redirection = _redirect.in_force
    if redirection is None:
        yield
        return
    with redirection.keeping_cpu():
        yield
