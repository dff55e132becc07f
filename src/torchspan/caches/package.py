"""Entries of torch's cache folder as bytes, for another process that is to load and not to compile."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torchspan.caches import ledger
from torchspan.core.errors import IntegrityError
from torchspan.core.files import write_whole


@dataclass(frozen=True)
class Entries:
    """What one compile left: `files` (path in the cache folder → digest), and `isas`, the vector instructions that work."""

    files: Mapping[str, str] = field(default_factory=dict)
    isas: Mapping[str, bool] = field(default_factory=dict)


def pack(entries: Entries, folder: Path) -> bytes:
    """The entries with their contents; raises OSError if one is gone, IntegrityError if one has changed."""
    contents = [(folder / name).read_bytes() for name in entries.files]
    for (name, expected), content in zip(entries.files.items(), contents):
        _check(name, expected, content)
    header = {"files": entries.files, "sizes": [len(content) for content in contents], "isas": entries.isas}
    head = json.dumps(header).encode()
    return b"".join([len(head).to_bytes(8, "big"), head, *contents])


def unpack(packed: bytes, folder: Path) -> Entries:
    """Put packed entries into the cache folder `folder`, each whole or not at all; those that are there already stay.

    Raises:
        IntegrityError: they are not what was packed, or one would lie outside of the folder; then nothing is written.
    """
    start = 8 + int.from_bytes(packed[:8], "big")
    try:
        header = json.loads(packed[8:start])
        files, sizes, isas = dict(header["files"]), list(header["sizes"]), dict(header["isas"])
    except (ValueError, KeyError, TypeError) as cause:
        raise IntegrityError(f"the packed entries of the cache cannot be read ({type(cause).__name__})") from cause
    contents: dict[str, bytes] = {}
    for name, size in zip(files, sizes):
        contents[name] = packed[start : start + size]
        start += size
    for name, expected in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise IntegrityError(f"an entry of the cache would lie outside of its folder: {name!r}")
        _check(name, expected, contents.get(name, b""))
    for name, content in contents.items():
        _put(folder / name, content)
    ledger.write(folder, files)
    return Entries(files, isas)


def _check(name: str, expected: str, content: bytes) -> None:
    if hashlib.sha256(content).hexdigest() != expected:
        raise IntegrityError(f"an entry of the cache differs from what was written: {name!r}")


def _put(path: Path, content: bytes) -> None:
    if path.is_file() and path.read_bytes() == content:
        return  # ranks may share the folder
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
