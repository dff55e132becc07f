"""Attributes, entries and functions that are replaced inside a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import partial
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


@contextmanager
def in_calls_with(marker: object, module: Any, functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Inside, these functions of a module or class stand for its own in calls that get `marker`; others get its own.

    >>> class Sizes:
    ...     def of(what): return len(what)
    >>> with in_calls_with(word := "four", Sizes, {"of": lambda what: 1}): Sizes.of(word), Sizes.of("three")
    (1, 5)
    """
    own = {name: getattr(module, name) for name in functions}
    before = {name: vars(module)[name] for name in functions}  # of a class, a static method

    def choose(name: str, *args: Any, **kwargs: Any) -> Any:
        is_marked = any(value is marker for value in (*args, *kwargs.values()))
        return (functions if is_marked else own)[name](*args, **kwargs)

    for name in functions:
        setattr(module, name, partial(choose, name))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)
