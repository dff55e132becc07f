"""The folders of jobs: each is removed when its job is done, when its process ends, or by a later program's sweep."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "torchspan-job-"
SETTLED_S = 60.0  # a folder so new may not have its maker's lock yet
_mine: dict[Path, int | None] = {}  # the folders of this process, and what holds the lock of each


@contextmanager
def job_folder() -> Iterator[Path]:
    """A new folder in the folder for temporary files, which is locked while this process lives, and gone after the block."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    _mine[folder] = _locked(folder)
    try:
        yield folder
    finally:
        _remove(folder)


def sweep() -> None:
    """Remove the folders of processes that were killed: those whose lock nobody holds."""
    try:
        folders = list(Path(tempfile.gettempdir()).glob(f"{PREFIX}*"))
    except OSError:  # there is no folder for temporary files: making one raises a clear error
        return
    for folder in folders:
        if folder not in _mine and _is_settled(folder):
            _remove_if_left(folder)


def _is_settled(folder: Path) -> bool:
    try:
        return folder.is_dir() and not folder.is_symlink() and time.time() - folder.stat().st_mtime > SETTLED_S
    except OSError:  # another sweep was faster
        return False


def _remove_if_left(folder: Path) -> None:
    lock = _locked(folder)
    if lock is None:
        return
    try:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _locked(folder: Path) -> int | None:
    """Lock `folder`, until what this gives is closed or the process ends; None where another process has it locked."""
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked, not ours to open, or on a file system without locks: then nobody sweeps it either
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def _remove(folder: Path) -> None:
    if folder not in _mine:  # this is a fork, or the program ended meanwhile
        return
    lock = _mine.pop(folder)
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def _remove_all() -> None:
    for folder in tuple(_mine):
        _remove(folder)


def _forget() -> None:
    """In a fork: the folders belong to the process that forked."""
    for lock in _mine.values():
        if lock is not None:
            os.close(lock)
    _mine.clear()


atexit.register(_remove_all)
os.register_at_fork(after_in_child=_forget)
