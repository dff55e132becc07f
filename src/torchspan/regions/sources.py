"""Which files a program was made of, so that a later start can tell whether it is still the same.

A program is sent to a compile process with the names of its functions and classes. Their code is in files, which may be edited,
or replaced with another version of a package. The process that compiled the program knows which files it has imported.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import torch

from torchspan.private import inductor

_LIBRARY = tuple(str(Path(sysconfig.get_path(name))) for name in ("stdlib", "platstdlib"))
_INSTALLED = ("/site-packages/", "/dist-packages/")
_OWN = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))  # whose versions are noted by themselves


def sources_here() -> dict[str, str]:
    """The file of each module that this process has imported, without torch's and Python's, with a mark of its content."""
    excluded = (*_OWN, str(inductor.cache_folder()))  # what inductor has made is in the ledger
    files = {str(file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
    own = [file for file in sorted(files) if not (file.startswith(excluded) or _is_of_python(file))]
    return {file: mark for file in own if (mark := _mark(file)) is not None}


def changed_sources(sources: Mapping[str, str]) -> list[str]:
    """The files that have changed, or are gone."""
    return [file for file, mark in sources.items() if _mark(file) != mark]


def _is_of_python(file: str) -> bool:
    return file.startswith(_LIBRARY) and not _is_installed(file)


def _is_installed(file: str) -> bool:
    return any(folder in file for folder in _INSTALLED)


def _mark(file: str) -> str | None:
    """The digest of a file; for an installed package its size and time: it has many files, which are not edited."""
    try:
        if _is_installed(file):
            status = Path(file).stat()
            return f"{status.st_size} {status.st_mtime_ns}"
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError:
        return None
