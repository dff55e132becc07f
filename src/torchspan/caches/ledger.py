"""Keeps torch's cache folder whole and within its size: what a compile used is noted with its digest, and checked before use.

The compile process opens its cache entries under an audit hook (so no function of torch's has to be known): what it reads is
compared with the digest that was noted when the entry was made, and an entry that differs is removed and made again. The
caller's process checks the entries that it is about to load in the same way. A ledger is one small file a compile, in the
folder ``torchspan`` of the cache; the oldest ones go, with their entries, when the folder is over its limit. What no ledger
names, such as the entries of a plain ``torch.compile``, is neither counted nor removed, but a native library among it must be
as long as its own header says.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchspan.core.files import write_whole
from torchspan.core.text import format_bytes, parse_bytes

LIMIT_VARIABLE = "TORCHSPAN_CACHE_LIMIT"
DEFAULT_LIMIT = "16GiB"
DAMAGED = "the cache entry was damaged, and was removed:"
_FOLDER = "torchspan"
_PATH_AT = {"open": 0, "ctypes.dlopen": 0, "import": 1, "os.rename": 1}  # audit events, and which argument is the file


class CorruptEntryError(OSError):
    """A cache entry is not what was written; it was removed. An OSError, which torch takes for an entry that is not there."""

    is_cache_damaged = True  # what a job that raises it tells its caller


@dataclass(frozen=True)
class Kept:
    """What a compile left in the cache: `files` (path in its folder → digest), what was `dropped` as damaged, `evicted`."""

    files: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    evicted: str | None = None
    not_noted: str | None = None


class _Watch:
    """Sees which files of a cache folder this process opens, and lets no damaged one pass."""

    def __init__(self, folder: Path) -> None:
        self._folder = os.path.abspath(folder) + os.sep
        self._known = _noted(folder)
        self._used: set[str] = set()
        self._sound: set[str] = set()
        self._is_busy = False
        self.dropped: list[str] = []

    def saw(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit event of Python's."""
        if self._is_busy or event not in _PATH_AT:
            return
        opened = arguments[_PATH_AT[event]]
        if not isinstance(opened, (str, os.PathLike)):
            return
        path = os.path.abspath(os.fspath(opened))
        if not path.startswith(self._folder):
            return
        self._is_busy = True
        try:
            self._note(path, is_read=event != "os.rename" and (event != "open" or not _writes(arguments)))
        finally:
            self._is_busy = False

    def _note(self, path: str, *, is_read: bool) -> None:
        name = path[len(self._folder) :]
        self._used.add(name)
        if not is_read or name in self._sound or not os.path.isfile(path):
            return
        self._sound.add(name)
        if name in self._known:
            is_sound = digest(path) in self._known[name]
        else:
            is_sound = not name.endswith(".so") or _is_whole_library(path)
        if not is_sound:
            os.unlink(path)
            self.dropped.append(name)
            raise CorruptEntryError(f"{DAMAGED} {name}")

    def files(self) -> dict[str, str]:
        """The entries that were used or made, with their digests."""
        digests = {}
        for name in sorted(self._used):
            path = self._folder + name
            if not name.startswith((_FOLDER + os.sep, "locks" + os.sep)) and os.path.isfile(path):
                digests[name] = digest(path)
        return digests


_watches: list[_Watch] = []
_has_hook: list[bool] = []


@contextmanager
def watching(folder: Path) -> Iterator[Callable[[], Kept]]:
    """Guard this process's use of the cache `folder` inside the block; gives a function that notes what was used."""
    if not _has_hook:
        _has_hook.append(True)
        sys.addaudithook(_audit)  # cannot be taken away again; without a watch it does nothing
    watch = _Watch(folder)

    def note() -> Kept:
        _watches.remove(watch)
        files = watch.files()
        try:
            write(folder, files)
            return Kept(files, tuple(watch.dropped), evict(folder, limit_bytes()))
        except OSError as cause:
            return Kept(files, tuple(watch.dropped), not_noted=f"{type(cause).__name__}: {cause}")

    _watches.append(watch)
    try:
        yield note
    finally:
        if watch in _watches:
            _watches.remove(watch)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    for watch in _watches:
        watch.saw(event, arguments)


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    return bool((flags or 0) & (os.O_WRONLY | os.O_RDWR)) or any(letter in (mode or "") for letter in "wax+")


def check(folder: Path, files: Mapping[str, str]) -> list[str]:
    """Remove damaged ones of `files`, and give their names; an entry that was written again since may have another digest."""
    actual = {name: _digest_if_there(folder / name) for name in files}
    differ = [name for name, expected in files.items() if actual[name] != expected]
    noted = _noted(folder) if differ else {}
    damaged = [name for name in differ if actual[name] not in noted.get(name, ())]
    for name in damaged:
        (folder / name).unlink(missing_ok=True)
    return damaged


def digest(path: str | Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def _digest_if_there(path: Path) -> str | None:
    return digest(path) if path.is_file() else None


def _is_whole_library(path: str) -> bool:
    """Whether an ELF file is as long as its header says; a linker that was killed leaves a shorter one. True of others."""
    with open(path, "rb") as file:
        header = file.read(64)
        size = os.fstat(file.fileno()).st_size
    if header[:5] != b"\x7fELF\x02":
        return sys.platform != "linux"
    (offset,) = struct.unpack_from("<Q", header, 0x28)
    entry_size, count = struct.unpack_from("<HH", header, 0x3A)
    return offset > 0 and offset + entry_size * count <= size


# the ledgers


def limit_bytes() -> int:
    """How large the noted entries of a cache folder may be together: TORCHSPAN_CACHE_LIMIT, 16 GiB by default."""
    return parse_bytes(os.environ.get(LIMIT_VARIABLE) or DEFAULT_LIMIT)


def _ledgers(folder: Path) -> list[Path]:
    return sorted((folder / _FOLDER).glob("*.json"), key=_time_of)


def _time_of(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def _read(ledger: Path) -> dict[str, str]:
    """What a ledger notes; nothing if it is damaged itself or gone meanwhile."""
    try:
        files = json.loads(ledger.read_text())["files"]
        return {str(name): str(value) for name, value in files.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}


def _noted(folder: Path) -> dict[str, set[str]]:
    """Every digest that an entry was noted with."""
    digests: dict[str, set[str]] = {}
    for ledger in _ledgers(folder):
        for name, value in _read(ledger).items():
            digests.setdefault(name, set()).add(value)
    return digests


def write(folder: Path, files: Mapping[str, str]) -> None:
    """Note the entries of one compile in a ledger of their own."""
    if not files:
        return
    (folder / _FOLDER).mkdir(parents=True, exist_ok=True)
    content = json.dumps({"files": dict(files)})
    target = folder / _FOLDER / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.json"
    write_whole(target, content.encode())


def evict(folder: Path, limit: int) -> str | None:
    """Remove the entries that were used longest ago until the noted ones are within `limit` bytes; says what was removed."""
    ledgers = [(ledger, _read(ledger)) for ledger in _ledgers(folder)]
    sizes = {name: _size(folder / name) for _, files in ledgers for name in files}
    total = before = sum(sizes.values())
    num_removed = 0
    while total > limit and len(ledgers) > 1:  # the newest is of this compile
        ledger, files = ledgers.pop(0)
        still_used = {name for _, entries in ledgers for name in entries}
        for name in files.keys() - still_used:
            (folder / name).unlink(missing_ok=True)
            total -= sizes[name]
            num_removed += 1
        ledger.unlink(missing_ok=True)
    if not num_removed:
        return None
    size = f"the cache held {format_bytes(before)} of {format_bytes(limit)}"
    return f"{size}; the entries used longest ago were removed: {num_removed}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
