"""What earlier runs of a program compiled, in the cache folder, by a digest of the program: a later start loads it.

A record is one file, ``torchspan/starts/NAME-DIGEST``, which begins with the SHA-256 of the rest. The ledger counts it with the
entries of torch's caches, and evicts it with them.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from torchspan.caches import ledger
from torchspan.core.files import write_whole

_FOLDER = Path("torchspan") / "starts"
_DIGEST_BYTES = 32


def may_have(folder: Path, name: str) -> bool:
    """Whether there is any record of a program called `name`: a look at the names of files only."""
    return next((folder / _FOLDER).glob(f"{_short(name)}-*"), None) is not None


def read(folder: Path, name: str, digest: str) -> bytes | None:
    """What was kept for a program of this name and digest; None if nothing was, or if it is damaged, which removes it.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> keep(folder, "model", "ab12", b"compiled")
    >>> read(folder, "model", "ab12"), read(folder, "model", "ff00"), may_have(folder, "model"), may_have(folder, "other")
    (b'compiled', None, True, False)
    """
    path = _path(folder, name, digest)
    try:
        content = path.read_bytes()
    except OSError:
        return None
    expected, record = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(record).digest() != expected:
        remove(folder, name, digest)
        return None
    with suppress(OSError):  # a folder that takes no file is one to read from; else others are evicted first
        _note(folder, path, content)
    return record


def keep(folder: Path, name: str, digest: str, record: bytes) -> None:
    """Keep `record` for a program of this name and digest. Raises OSError where the folder takes no file."""
    path = _path(folder, name, digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = hashlib.sha256(record).digest() + record
    write_whole(path, content)
    _note(folder, path, content)


def remove(folder: Path, name: str, digest: str) -> None:
    """Remove the record: its code cannot be used."""
    _path(folder, name, digest).unlink(missing_ok=True)


def _note(folder: Path, path: Path, content: bytes) -> None:
    ledger.write(folder, {path.relative_to(folder).as_posix(): hashlib.sha256(content).hexdigest()})


def _path(folder: Path, name: str, digest: str) -> Path:
    return folder / _FOLDER / f"{_short(name)}-{digest}"


def _short(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]
