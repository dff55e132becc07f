"""Dimensions of tensors that dynamo takes as symbols while it traces."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from torchspan.private import dynamo


@dataclass(frozen=True)
class Dynamic:
    """A dimension that is dynamic: from `minimum` to `maximum`; a wish may be fixed where the program needs it to be."""

    minimum: int | None = None
    maximum: int | None = None
    is_wish: bool = False


@contextmanager
def dynamic_dims(tensors: Sequence[Tensor], dims: Sequence[Mapping[int, Dynamic]]) -> Iterator[None]:
    """Have dynamo take these dimensions of each tensor as symbols in what it traces inside; the tensors forget it after."""
    if not any(dims):
        yield
        return
    before = [dict(vars(tensor)) for tensor in tensors]
    try:
        for tensor, which in zip(tensors, dims, strict=True):
            for dim, dynamic in sorted(which.items()):
                if dynamic.is_wish:
                    dynamo.maybe_mark_dynamic(tensor, dim)
                elif dynamic.minimum is None and dynamic.maximum is None:
                    dynamo.mark_dynamic(tensor, dim)
                else:  # torch needs both bounds or none
                    dynamo.mark_dynamic(tensor, dim, min=dynamic.minimum or 2, max=dynamic.maximum or sys.maxsize - 1)
        yield
    finally:
        for tensor, known in zip(tensors, before, strict=True):
            vars(tensor).clear()
            vars(tensor).update(known)
