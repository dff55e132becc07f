"""The file of an artifact: a stored zip of a manifest and payloads; written whole or not at all, read with digests held."""

from __future__ import annotations

import hashlib
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torchspan.artifacts.manifest import read_manifest
from torchspan.core.errors import InputError, IntegrityError
from torchspan.core.files import write_whole
from torchspan.core.text import check_folder

MANIFEST = "manifest.json"
SIGNATURE = "signature.json"
_SIGNATURE_LIMIT = 4096
_MANIFEST_LIMIT = 64 * 1024**2
_TIME = (1980, 1, 1, 0, 0, 0)  # the same bytes for the same content


def write_members(file: BinaryIO, manifest: bytes, payloads: Mapping[str, bytes], signature: bytes | None = None) -> None:
    """Write an artifact into an open file."""
    last = {} if signature is None else {SIGNATURE: signature}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for member, data in {MANIFEST: manifest, **payloads, **last}.items():
            archive.writestr(zipfile.ZipInfo(member, _TIME), data)


def write_artifact(path: Path, manifest: bytes, payloads: Mapping[str, bytes], signature: bytes | None = None) -> None:
    """Write an artifact: into a file beside `path`, flushed to the disk, then renamed to it.

    Raises:
        InputError: there is no folder to write into.
    """
    write_whole(check_folder(path), lambda file: write_members(file, manifest, payloads, signature))


class Store:
    """An artifact's file, open for reading; a context manager. Opening reads and verifies the manifest, and nothing else."""

    def __init__(self, path: str | os.PathLike[str] | BinaryIO) -> None:
        is_path = isinstance(path, (str, os.PathLike))
        if not is_path and not hasattr(path, "read"):
            raise InputError(f"an artifact is loaded from a path or an open file, not from a {type(path).__name__}")
        self.path = path if is_path else "what was given as an artifact"
        self.signature: bytes | None = None
        try:
            self._archive = zipfile.ZipFile(path)
        except FileNotFoundError:
            raise InputError(f"no artifact {str(path)!r}; 'torchspan precompile' makes one") from None
        except IsADirectoryError:
            raise InputError(f"{str(path)!r} is a folder; an artifact is one file, such as model.tspan") from None
        except (zipfile.BadZipFile, OSError, ValueError, struct.error, NotImplementedError) as cause:
            raise IntegrityError(f"{self.path} is not an artifact, or only a part of one ({cause}); build it again") from cause
        try:
            self.manifest = self._read_manifest()
        except BaseException:
            self._archive.close()
            raise

    def _read_signature(self, member: zipfile.ZipInfo) -> bytes:
        if member.file_size > _SIGNATURE_LIMIT:
            raise IntegrityError(
                f"{self.path} has a signature of {member.file_size} bytes; at most {_SIGNATURE_LIMIT} are read"
            )
        return self._read(member)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._archive.close()

    def _read_manifest(self) -> dict[str, Any]:
        members = self._archive.infolist()
        names = [member.filename for member in members]
        if not members or names[0] != MANIFEST or len(set(names)) != len(names):
            raise IntegrityError(
                f"{self.path} is not an artifact: its members are {names[:5]}; expected {MANIFEST} first, each once"
            )
        if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in members):
            raise IntegrityError(f"{self.path} has compressed or encrypted members; an artifact has neither")
        if members[0].file_size > _MANIFEST_LIMIT:
            raise IntegrityError(
                f"{self.path} has a manifest of {members[0].file_size} bytes; at most {_MANIFEST_LIMIT} are read"
            )
        if names[-1] == SIGNATURE:
            self.signature = self._read_signature(members.pop())
            names.pop()
        self.manifest_bytes = self._read(members[0])
        manifest = read_manifest(self.manifest_bytes)
        listed = {payload["name"]: payload["size"] for payload in manifest["payloads"]}
        if names[1:] != list(listed) or any(member.file_size != listed[member.filename] for member in members[1:]):
            raise IntegrityError(f"{self.path} does not hold the payloads that its manifest lists; build it again")
        return manifest

    def payloads(self) -> dict[str, bytes]:
        """Every payload by name, once all digests hold.

        Raises:
            IntegrityError: a payload is not what was written; names it.
        """
        contents = {}
        for listed in self.manifest["payloads"]:
            data = self._read(self._archive.getinfo(listed["name"]))
            if hashlib.sha256(data).hexdigest() != listed["sha256"]:
                raise IntegrityError(
                    f"{self.path}: payload {listed['name']!r} is not as it was written (SHA-256 differs); build it again"
                )
            contents[listed["name"]] = data
        return contents

    def _read(self, member: zipfile.ZipInfo) -> bytes:
        try:
            return self._archive.read(member)
        except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, struct.error, zlib.error) as cause:
            raise IntegrityError(
                f"{self.path}: {member.filename!r} cannot be read ({cause}); make the artifact again"
            ) from cause
