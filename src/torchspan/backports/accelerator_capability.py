"""``torch.accelerator.get_device_capability``: the types of numbers that a device computes with."""

from __future__ import annotations

from typing import Any

import torch

from torchspan.backports._base import Backport
from torchspan.core.dtypes import dtypes_of


def get_device_capability(device: Any = None, /) -> dict[str, Any]:
    """The types of numbers of which a device can hold a tensor and turn it into another: ``supported_dtypes``.

    Raises:
        RuntimeError: there is no accelerator.
    """
    from torch.accelerator._utils import _get_device_index

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        raise RuntimeError("Cannot access accelerator device when none is available.")
    index = _get_device_index(device, optional=True)
    return {"supported_dtypes": set(dtypes_of(torch.device(accelerator.type, index)))}


BACKPORT = Backport(
    name="accelerator_capability",
    summary="the types of numbers that the accelerator computes with: torch.accelerator.get_device_capability",
    target="torch.accelerator",
    since="2.10.0",
    upstream="https://github.com/pytorch/pytorch/tree/v2.10.0/torch/accelerator/__init__.py",
    differs="they are tried out",
    names={"get_device_capability": lambda: get_device_capability},
)
