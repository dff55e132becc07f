"""Digests of Python code: equal in every process, and different when the code may do something different."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator
from functools import partial
from operator import is_
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch

_TORCH_ROOT = str(Path(torch.__file__).parent)
_PYTHON_ROOT = str(Path(os.__file__).parent)
_MOST_KNOWN = 512
_OWN_ROOT = str(Path(__file__).parents[1])


class Seen:
    """The code objects that digests have covered."""

    def __init__(self) -> None:
        self._codes: dict[int, CodeType] = {}

    def add(self, code: CodeType) -> None:
        """Mark a code object, and those inside it."""
        self._codes[id(code)] = code
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self.add(constant)

    def __contains__(self, code: CodeType) -> bool:
        return id(code) in self._codes


def is_torch_code(code: CodeType) -> bool:
    """Whether code is torch's own: an artifact is for one release of torch, so it needs no digest."""
    return code.co_filename.startswith(_TORCH_ROOT)


def is_own_code(code: CodeType) -> bool:
    """Whether code is torchspan's own: a backport, a device rule's wrapper, or what a capture calls the program through."""
    return code.co_filename.startswith(_OWN_ROOT)


def digest_function(function: Any, seen: Seen | None = None) -> str:
    """A digest of what a function does: its code, defaults, and the functions that it closes over; not where it is written.

    >>> def one(x): return x + 1
    >>> def two(x): return x + 1
    >>> def three(x): return x + 2
    >>> digest_function(one) == digest_function(two), digest_function(one) == digest_function(three)
    (True, False)
    """
    digest = hashlib.sha256()
    for part in _parts(function, seen or Seen(), set()):
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def digest_class(cls: type, seen: Seen | None = None) -> str | None:
    """A digest of the methods of a class and of its bases, or None if all of them are torch's or Python's.

    >>> import logging
    >>> digest_class(torch.nn.Linear) is None, digest_class(logging.Logger) is None
    (True, True)
    """
    parts = []
    for base in cls.__mro__:
        if not _is_of_torch_or_python(base):
            parts += _known_methods(base) if seen is None else _methods(base, seen)
        elif "forward" in vars(base):
            parts += _replaced(vars(base)["forward"])
    return hashlib.sha256("\n".join(parts).encode()).hexdigest() if parts else None


def _is_of_torch_or_python(cls: type) -> bool:
    """Whether a class is torch's or Python's, whose versions an artifact checks; what others add to the class is ignored."""
    top = cls.__module__.partition(".")[0]
    if top == "torch":
        return True
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return top in sys.stdlib_module_names and (file is None or file.startswith(_PYTHON_ROOT))


def _replaced(forward: Any) -> list[str]:
    """The digest of the function that replaces torch's own ``forward``; nothing where it was not replaced."""
    code = getattr(forward, "__code__", None)
    is_own = code is None or is_torch_code(code) or is_own_code(code) or code.co_filename == contextlib.__file__
    return [] if is_own else [f"forward {digest_function(forward)}"]


def _methods(cls: type, seen: Seen) -> list[str]:
    """The methods of one class with their digests."""
    parts = []
    for name, member in sorted(vars(cls).items()):
        is_code = callable(member) or isinstance(member, (staticmethod, classmethod, property, partial))
        if is_code and not isinstance(member, type):
            parts.append(f"{name} {digest_function(member, seen)}")
    return parts


_KNOWN: dict[type, tuple[list[Any], list[str]]] = {}


def _known_methods(cls: type) -> list[str]:
    """`_methods`, computed again only when the attributes of the class change: the classes of a model share bases."""
    members = list(vars(cls).values())
    members_before, parts = _KNOWN.get(cls, ([], []))
    if len(members_before) != len(members) or not all(map(is_, members_before, members)):
        parts = _methods(cls, Seen())
        if len(_KNOWN) >= _MOST_KNOWN:  # it keeps the classes alive
            _KNOWN.clear()
        _KNOWN[cls] = (members, parts)
    return parts


def _parts(value: Any, seen: Seen, visited: set[int]) -> Iterator[str]:
    if id(value) in visited:
        return
    visited.add(id(value))
    if isinstance(value, CodeType):
        seen.add(value)
        yield from _code_parts(value)
    elif isinstance(value, FunctionType):
        yield from _parts(value.__code__, seen, visited)
        for default in (*(value.__defaults__ or ()), *sorted((value.__kwdefaults__ or {}).items())):
            yield _stable(default)
        for cell in value.__closure__ or ():
            yield from _cell_parts(cell, seen, visited)
    elif isinstance(value, (staticmethod, classmethod, MethodType)):
        yield from _parts(value.__func__, seen, visited)
    elif isinstance(value, property):
        for function in (value.fget, value.fset, value.fdel):
            yield from _parts(function, seen, visited)
    elif isinstance(value, partial):
        yield _stable(value.args) + _stable(tuple(sorted(value.keywords)))
        yield from _parts(value.func, seen, visited)
    else:
        wrapped = getattr(value, "__wrapped__", None)
        yield type(value).__qualname__
        if wrapped is not None:
            yield from _parts(wrapped, seen, visited)


def _cell_parts(cell: Any, seen: Seen, visited: set[int]) -> Iterator[str]:
    try:
        content = cell.cell_contents
    except ValueError:  # not filled yet
        return
    if callable(content) and not isinstance(content, type):
        yield from _parts(content, seen, visited)


def _code_parts(code: CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield repr((code.co_argcount, code.co_kwonlyargcount, code.co_names, code.co_freevars, code.co_flags))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code_parts(constant)
        else:
            yield _stable(constant)


def _stable(value: Any) -> str:
    """A text that is the same in every process: no addresses, no order of a set."""
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__}{sorted(map(_stable, value))}"
    if isinstance(value, tuple):
        return f"({','.join(map(_stable, value))})"
    if (
        value is None
        or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device))
        or value is Ellipsis
    ):
        return repr(value)
    return type(value).__qualname__
