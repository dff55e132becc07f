"""Make the database that ``torchspan scan`` reads: every importable name of torch, with its parameters, in each release.

    python tools/make_names_database.py                      the releases below, from the index that pip is configured for
    python tools/make_names_database.py 2.8.0 2.15.0         these releases
    python tools/make_names_database.py --keep FOLDER        keep what is read of each wheel, and use what is there already

Wheels are fetched by pip, so its index, certificate and proxy settings hold. Of each release the smallest wheel is taken, the
one for macOS: its Python files are those of the others, version.py aside. Nothing in a wheel is installed, imported or run.
"""

from __future__ import annotations

import argparse
import lzma
import pickle
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from functools import cache
from pathlib import Path

from _link_names import Release, Wheel, encode, link, read_release, settle_c_names, settle_kinds, settle_operators
from _module_names import ROOTS, ModuleNames, read_module

RELEASES = ("2.6.0", "2.7.1", "2.8.0", "2.9.1", "2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
DATABASE = Path(__file__).resolve().parents[1] / "src" / "torchspan" / "scan" / "names.xz"
OPERATORS = "torchgen/packaged/ATen/native/native_functions.yaml"
LIBRARIES = ("libtorch_python.dylib", "libtorch_cpu.dylib", "libc10.dylib")
PLATFORMS = [f"macosx_{version}_0_arm64" for version in range(11, 16)]


def main() -> None:
    """Read every release and write the database."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", default=RELEASES, metavar="RELEASE", help="torch releases, oldest first")
    parser.add_argument("--keep", type=Path, help="a folder for what is read of each wheel")
    parser.add_argument("--out", type=Path, default=DATABASE, help="the file to write")
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        releases = [_read(release, folder) for release in options.releases]
    settle_c_names(releases)
    for release in releases:
        link(release)
    settle_operators(releases)
    settle_kinds(releases)
    text = encode(releases)
    options.out.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    size = f"{len(text) / 1e6:.1f} MB as text, {options.out.stat().st_size / 1e3:.0f} kB compressed"
    _say(f"{options.out}: {len(releases)} releases, {size}, {time.monotonic() - start:.0f} s")


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _read(release: str, folder: Path) -> Release:
    copy = folder / f"torch-{release}.zip"
    if not copy.exists():
        _extract(next(folder.glob(f"torch-{release}-*.whl"), None) or _download(release, folder), copy)
    with zipfile.ZipFile(copy) as archive:
        texts = {name: archive.read(name) for name in archive.namelist()}
    sources = {name: text.decode() for name, text in texts.items() if name.endswith((".py", ".pyi"))}
    _say(f"torch {release}: {len(sources)} files")
    return read_release(Wheel(release, sources, texts[OPERATORS].decode(), texts["libraries"]), _read_once)


def _download(release: str, folder: Path) -> Path:
    """The wheel of `release`, fetched by pip."""
    platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
    command = ["-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "--python-version", "3.11", *platforms]
    subprocess.run([sys.executable, *command, "-d", str(folder), f"torch=={release}"], check=True)
    return next(folder.glob(f"torch-{release}-*.whl"))


def _extract(wheel: Path, copy: Path) -> None:
    """Keep what is read of `wheel`, and delete it."""
    partial = copy.with_suffix(".part")
    with zipfile.ZipFile(wheel) as archive, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as out:
        for name in archive.namelist():
            if (name.partition("/")[0] in ROOTS and name.endswith((".py", ".pyi"))) or name == OPERATORS:
                out.writestr(name, archive.read(name))
        libraries = [name for name in archive.namelist() if name.endswith(LIBRARIES)]
        out.writestr("libraries", b"\0".join(texts_in(archive.read(name)) for name in libraries))
    partial.rename(copy)
    wheel.unlink()


def texts_in(library: bytes) -> bytes:
    """The texts in a compiled library that can be a name or an operator's schema."""
    plain = b"\0".join(set(re.findall(rb"(?:(?<=\0)|\A)[\x20-\x7e]{3,}(?=\0|\Z)", library)))
    texts = set(re.findall(rb"(?<![A-Za-z0-9_.])[A-Za-z_][A-Za-z0-9_.]{2,80}[\x00(]", plain + b"\0"))
    return b"".join(sorted(texts))


def _read_once(name: str, text: str, *, is_package: bool, is_stub: bool) -> ModuleNames:
    """`read_module`, once for a file that several releases have."""
    return pickle.loads(_pickled(name, text, is_package, is_stub))


@cache
def _pickled(name: str, text: str, is_package: bool, is_stub: bool) -> bytes:
    return pickle.dumps(read_module(name, text, is_package=is_package, is_stub=is_stub))


if __name__ == "__main__":
    main()
