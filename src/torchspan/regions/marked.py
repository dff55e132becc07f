"""What is dynamic in a call while it is traced: sizes of its tensors, and numbers among its arguments."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torchspan.capture.dynamic_dims import Dynamic, dynamic_dims
from torchspan.core.replaced import replaced
from torchspan.private import dynamo, fx
from torchspan.regions.signature import Dims, family, tensors_of


@contextmanager
def marked(args: tuple[Any, ...], kwargs: Mapping[str, Any], dims: Dims) -> Iterator[None]:
    """Have dynamo make symbols of these dimensions and numbers of a call in what it traces inside."""
    if not any(dims):
        yield
        return
    values = family(None, args, kwargs)[1][-1]
    numbers = [values[place] for place in sorted(dims[-1])]
    symbols = [dict.fromkeys(tensor_dims, Dynamic()) for tensor_dims in dims[:-1]]
    with dynamic_dims(tensors_of(args, kwargs), symbols), dynamic_numbers(numbers):
        yield


@contextmanager
def dynamic_numbers(numbers: Sequence[float]) -> Iterator[None]:
    """Have dynamo make a symbol of each value that equals one of these numbers, in what this thread traces inside.

    A number is known by its value and class, not by its source: after a graph break the same number has another source. A
    constant of the program that has the same value becomes a symbol too, which saves a guard and changes no result.
    """
    if not numbers:
        yield
        return
    builder, auto_dynamic, as_symbol = dynamo.builder, dynamo.auto_dynamic, fx.DimDynamic.DYNAMIC
    mine, typed_numbers = threading.get_ident(), {(type(number), number) for number in numbers}
    wrap, process = builder.VariableBuilder.wrap_symint, builder.process_automatic_dynamic

    def is_wanted(value: Any) -> bool:
        return threading.get_ident() == mine and type(value) in (int, float) and (type(value), value) in typed_numbers

    def wrap_symint(self: Any, value: int, dynamism: Any = None, *args: Any, **kwargs: Any) -> Any:
        return wrap(self, value, as_symbol if dynamism is None and is_wanted(value) else dynamism, *args, **kwargs)

    def processed(tx: Any, name: str, entry: Any, **kwargs: Any) -> Any:
        result = process(tx, name, entry, **kwargs)
        return dataclasses.replace(result, scalar=auto_dynamic) if is_wanted(entry.scalar) else result

    with (
        replaced(builder.VariableBuilder, "wrap_symint", wrap_symint),
        replaced(builder, "process_automatic_dynamic", processed),
    ):
        yield
