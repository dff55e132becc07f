"""What a program stores on the objects that it was given: found by running its bytecode, and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from torchspan.artifacts.paths import Path, follow, parse_path
from torchspan.artifacts.values import encode
from torchspan.capture.dynamo import Frame
from torchspan.core.errors import UnsupportedError
from torchspan.core.program import Program

_ABSENT = object()


@contextmanager
def kept_as_they_were(frame: Frame, program: Program) -> Iterator[list[tuple[Path, Any, Any]]]:
    """Inside, the captured bytecode may run. At the end its changes are undone, and listed as path, key and new value.

    The key of a dict is in a list of its own; a name is that of an attribute.

    Raises:
        UnsupportedError: a change of another kind, or of a constant: the next call would find that one.
    """
    values = {"target": program.target, "args": program.args, "kwargs": dict(program.kwargs)}
    changes: list[tuple[Path, Any, Any]] = []
    places = [place for source in frame.changes for place in _places(source, frame, values, program)]
    before = [(path, held, dict(held), is_dict) for path, held, is_dict in places]
    try:
        yield changes
        for path, held, old, is_dict in before:
            gone = [key for key in old if key not in held]
            for key, value in [*((key, _ABSENT) for key in gone), *held.items()]:
                if value is not old.get(key, _ABSENT) and not _is_equal(value, old.get(key, _ABSENT)):
                    if value is _ABSENT or not _has_tensors(value):
                        raise _refusal(program, f"{key!r} of {', '.join(frame.changes)}")
                    changes.append((path, [encode(key)] if is_dict else key, value))
    finally:
        for _, held, old, _ in before:
            held.clear()
            held.update(old)


def _refusal(program: Program, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"an artifact cannot hold {program.name}: its forward changes {what}; return the new value instead, or set it before"
    )


def _places(source: str, frame: Frame, values: Any, program: Program) -> Iterator[tuple[Path, dict[Any, Any], bool]]:
    """The dicts that a change of the object at `source` can be in."""
    try:
        path = parse_path(source, frame.scope)
    except UnsupportedError as cause:
        raise _refusal(program, source) from cause
    holder = follow(path, values) if path[0][0] == "local" else None
    if isinstance(holder, dict):
        yield path, holder, True
    elif hasattr(holder, "__dict__") and not isinstance(holder, type):
        yield path, vars(holder), False
        if isinstance(holder, torch.nn.Module):
            yield (*path, ("attr", "_buffers")), holder._buffers, True
    else:
        raise _refusal(program, source)


def _is_equal(value: Any, old: Any) -> bool:
    return type(value) is type(old) and isinstance(value, (bool, int, float, str, torch.dtype)) and value == old


def _has_tensors(value: Any) -> bool:
    """Whether a value is made of tensors: what a next call does with them, guards see."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(_has_tensors, value))
    return isinstance(value, torch.Tensor)
