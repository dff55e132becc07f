"""Entries of a cache folder that travel to another one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from torchspan.caches.package import Entries, pack, unpack
from torchspan.core.errors import IntegrityError

pytestmark = pytest.mark.once


@pytest.fixture
def packed(tmp_path: Path) -> bytes:
    contents = {"ab/cab.so": b"library", "fxgraph/x/y": b"", "z.py": b"source" * 100}
    for name, content in contents.items():
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_bytes(content)
    files = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    return pack(Entries(files, {"VecAVX2": True}), tmp_path / "from")


def test_entries_arrive_as_they_were(tmp_path: Path, packed: bytes) -> None:
    entries = unpack(packed, tmp_path / "to")
    assert entries.isas == {"VecAVX2": True}
    for name in entries.files:
        assert (tmp_path / "to" / name).read_bytes() == (tmp_path / "from" / name).read_bytes()
    assert unpack(packed, tmp_path / "to") == entries, "again, where they lie already"


def test_an_entry_that_changed_since_is_not_packed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"other")
    with pytest.raises(IntegrityError, match="differs from what was written: 'a'"):
        pack(Entries({"a": hashlib.sha256(b"a").hexdigest()}), tmp_path)


def test_damaged_bytes_are_refused_and_nothing_is_written(tmp_path: Path, packed: bytes) -> None:
    flipped = [packed[:at] + bytes([packed[at] ^ 1]) + packed[at + 1 :] for at in range(0, len(packed), 7)]
    cut = [packed[:length] for length in range(0, len(packed), 11)]
    refused = 0
    for number, damaged in enumerate([*flipped, *cut]):
        try:
            unpack(damaged, tmp_path / str(number))
        except IntegrityError:
            refused += 1
            assert not (tmp_path / str(number)).exists()
        else:  # a flip in a name, or in what was found of the machine
            assert (tmp_path / str(number)).is_dir()
    assert refused > len(cut)


@pytest.mark.parametrize("name", ["../out", "/out", "a/../../out"])
def test_an_entry_outside_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    head = json.dumps({"files": {name: hashlib.sha256(b"").hexdigest()}, "sizes": [0], "isas": {}}).encode()
    with pytest.raises(IntegrityError, match="outside of its folder"):
        unpack(len(head).to_bytes(8, "big") + head, tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []
