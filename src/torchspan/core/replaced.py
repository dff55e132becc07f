"""An attribute or an entry that is another for a while."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

_ABSENT = object()


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Have the attribute `name` of a class, module or object be `value` inside the block.

    After it, `owner` has what it had itself, or inherits again. Raises AttributeError where there is no such attribute.

    >>> class Base: size = 1
    >>> class Derived(Base): pass
    >>> with replaced(Derived, "size", 2): Derived.size
    2
    >>> Derived.size, "size" in vars(Derived)
    (1, False)
    """
    getattr(owner, name)
    before = vars(owner).get(name, _ABSENT)  # as it is stored: a staticmethod stays one
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def entries_replaced(mapping: MutableMapping[Any, Any], entries: dict[Any, Any]) -> Iterator[None]:
    """Have `entries` in `mapping` inside the block.

    >>> sizes = {"a": 1}
    >>> with entries_replaced(sizes, {"a": 2, "b": 3}): print(sizes)
    {'a': 2, 'b': 3}
    >>> sizes
    {'a': 1}
    """
    before = {key: mapping.get(key, _ABSENT) for key in entries}
    mapping.update(entries)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is _ABSENT:
                mapping.pop(key, None)
            else:
                mapping[key] = value
