"""``torch.accelerator.get_device_capability``: the types of numbers that a device computes with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch

from torchspan.backports._base import Backport


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
    return {"supported_dtypes": set(_dtypes(torch.device(accelerator.type, index)))}


def _dtypes(device: torch.device) -> Iterator[torch.dtype]:
    for name in sorted(vars(torch)):
        dtype = getattr(torch, name)
        if isinstance(dtype, torch.dtype) and name == str(dtype).partition(".")[2] and not name.startswith(("q", "bits")):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of complex numbers' imaginary parts, which nobody will miss
                    torch.empty(1, dtype=dtype, device=device).to(torch.float32)
            except (RuntimeError, NotImplementedError, TypeError):
                continue  # such as packed types, which nothing is turned from
            yield dtype


BACKPORT = Backport(
    name="accelerator_capability",
    summary="the types of numbers that the accelerator computes with: torch.accelerator.get_device_capability",
    target="torch.accelerator",
    since="2.10.0",
    upstream="https://github.com/pytorch/pytorch/tree/v2.10.0/torch/accelerator/__init__.py",
    differs="they are tried out",
    names={"get_device_capability": lambda: get_device_capability},
)
