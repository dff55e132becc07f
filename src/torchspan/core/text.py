"""Values that users write as text: sizes, durations, settings from the environment."""

from __future__ import annotations

import re
from pathlib import Path

from torchspan.core.errors import InputError

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)}
_UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)}


def parse_bytes(text: str | int) -> int:
    """A number of bytes from text such as ``4GiB``, ``512 MB`` or ``1e9``.

    >>> parse_bytes("1.5KiB"), parse_bytes("2 GB"), parse_bytes(7)
    (1536, 2000000000, 7)
    >>> parse_bytes("4 gigs")
    Traceback (most recent call last):
    torchspan.core.errors.InputError: '4 gigs' is no size in bytes; expected a number and a unit, such as 4GiB or 512MB
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", str(text).lower())
    unit = _UNITS.get(match[2]) if match else None
    try:
        if match and unit:
            return int(float(match[1]) * unit)
    except ValueError:
        unit = None  # "1.2.3": reported below, with everything else that is no number
    raise InputError(f"{text!r} is no size in bytes; expected a number and a unit, such as 4GiB or 512MB")


def format_bytes(num_bytes: float) -> str:
    """A number of bytes as a person reads it.

    >>> format_bytes(1536), format_bytes(3 * 1024**3), format_bytes(12)
    ('1.5 KiB', '3.0 GiB', '12 B')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def format_figure(name: str, value: float) -> tuple[str, str]:
    """A measured figure, whose name ends in its unit, as a person reads it: what it is, and how much.

    >>> format_figure("first_step_wait_s", 0.02512), format_figure("kept_bytes", 3 * 1024**2)
    (('first step wait', '0.0251 s'), ('kept', '3.0 MiB'))
    """
    label, _, unit = name.rpartition("_")
    return label.replace("_", " "), format_bytes(value) if unit == "bytes" else f"{value:.3g} {unit}"


def split_names(text: str | None) -> frozenset[str]:
    """Names from a comma-separated list.

    >>> sorted(split_names("a, b,,c"))
    ['a', 'b', 'c']
    """
    return frozenset(name.strip() for name in (text or "").split(",") if name.strip())


def check_folder(path: Path) -> Path:
    """`path`, if there is a folder to write it into.

    >>> check_folder(Path("no such folder", "report.html"))
    Traceback (most recent call last):
    torchspan.core.errors.InputError: no folder 'no such folder' to write 'report.html' into; make it first
    """
    if path.is_dir():
        raise InputError(f"{str(path)!r} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise InputError(f"no folder {str(path.parent)!r} to write {path.name!r} into; make it first")
    return path
