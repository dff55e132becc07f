"""A digest of a program that was made ready to be sent: the same in another process that runs the same program.

Pickled bytes are not the same there: a set is written in the order of its hashes, which differ from process to process, and
cloudpickle gives each class of the main script a random name. Values of tensors and what travels apart are left out.
"""

from __future__ import annotations

import hashlib
import pickletools
import re
from collections.abc import Iterator
from typing import Any

from torchspan.jobs import transport

_RANDOM_NAME = re.compile(r"[0-9a-f]{32}")
_FETCHED = ("BINGET", "LONG_BINGET")
_SET_ENDS = ("ADDITEMS", "FROZENSET")
_MARK_ENDS = {operation.name for operation in pickletools.opcodes if pickletools.markobject in operation.stack_before}


def digest(content: bytes, *more: str) -> str:
    """The digest of what :func:`.transport.dumps` gave, together with `more` text.

    >>> digest(transport.dumps({"a", "b"})) == digest(transport.dumps({"b", "a"})) != digest(transport.dumps({"a"}))
    True
    """
    opened = transport.opened(content)
    storages = [(number, num_bytes, device) for number, (num_bytes, device, _) in opened.storages.items()]
    total = hashlib.sha256(repr((more, storages, opened.groups)).encode())
    for token in _without_order(_tokens(opened.value)):
        total.update(repr(token).encode())
    return total.hexdigest()


def _tokens(pickled: bytes) -> Iterator[tuple[str, Any]]:
    """Each operation of a pickle with its argument; text that is fetched from the pickle's memory counts as the text."""
    memory: list[Any] = []
    latest: Any = None
    names: dict[str, str] = {}
    argument: Any
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name == "MEMOIZE":
            memory.append(latest)
        if operation.name in ("MEMOIZE", "FRAME"):  # a frame has a length, which goes by the order in a set
            continue
        if operation.name in _FETCHED and isinstance(memory[argument], str):
            latest = memory[argument]
            yield "text", latest
        elif isinstance(argument, str):
            is_random = _RANDOM_NAME.fullmatch(argument) is not None
            latest = names.setdefault(argument, f"name {len(names)}") if is_random else argument
            yield "text", latest
        else:
            latest = None
            yield operation.name, argument


def _without_order(tokens: Iterator[tuple[str, Any]]) -> Iterator[Any]:
    """The tokens, those of each set sorted."""
    open_marks: list[list[Any]] = [[]]
    for token in tokens:
        name, _ = token
        if name == "MARK":
            open_marks.append([])
        elif name in _SET_ENDS and len(open_marks) > 1:
            members = open_marks.pop()
            open_marks[-1].append((name, sorted(map(repr, members))))
        elif len(open_marks) > 1 and name in _MARK_ENDS:
            inner = open_marks.pop()
            open_marks[-1] += [("MARK", None), *inner, token]
        else:
            open_marks[-1].append(token)
    yield from (token for group in open_marks for token in group)
