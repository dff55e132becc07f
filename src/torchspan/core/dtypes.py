"""The types of numbers that a device computes with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch


def dtypes_of(device: torch.device) -> Iterator[torch.dtype]:
    """The types of which `device` can hold a tensor and turn it into another.

    >>> torch.float64 in set(dtypes_of(torch.device("cpu")))
    True
    """
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
