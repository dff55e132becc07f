"""What is dynamic in a call while it is traced: sizes of its tensors, and numbers among its arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torchspan.regions import _torch
from torchspan.regions.signature import Dims, family, tensors_of


@contextmanager
def marked(args: tuple[Any, ...], kwargs: Mapping[str, Any], dims: Dims) -> Iterator[None]:
    """Have dynamo take these dimensions and numbers of a call as symbols in what it traces inside; none if there are none."""
    if not any(dims):
        yield
        return
    values = family(None, args, kwargs)[1][-1]
    numbers = [values[place] for place in sorted(dims[-1])]
    with _torch.dynamic_dims(tensors_of(args, kwargs), dims[:-1]), _torch.dynamic_numbers(numbers):
        yield
