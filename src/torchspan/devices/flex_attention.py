"""FlexAttention on a CPU: eager torch has its backward there, of dense operators, and newer ones refuse it by a check alone.

The check is there since torch's compiler has no backward of it for a CPU. torch 2.8 has no such check; 2.13 and 2.15 do.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import wraps

from torch import Tensor

from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function
from torchspan.environment.patch import Patch, Redefinition


def patches(redirection: Redirection) -> Iterable[Patch]:
    """The check, where a program for a GPU runs on a CPU."""
    if redirection.target == "cpu":
        yield from training_patches()


def training_patches() -> list[Patch]:
    """Patches under which FlexAttention can be trained on a CPU."""
    return [Redefinition("flex_attention", "torch.nn.attention.flex_attention", "_validate_device", _without_the_cpu)]


def _without_the_cpu(old: Function) -> Function:
    """The check of devices, which lets the CPU through."""

    @wraps(old)
    def validate_device(query: Tensor, key: Tensor, value: Tensor) -> None:
        if query.device.type != "cpu":
            old(query, key, value)

    return validate_device
