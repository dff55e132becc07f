"""``torchspan scan``: which torch a code base needs, and what of it the backports cover."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rich.console import Console

from torchspan.cli.drawing import show
from torchspan.cli.parser import add_json

if TYPE_CHECKING:
    from torchspan.scan import Scan


def add(commands: Any) -> None:
    """Declare the command."""
    scan = commands.add_parser("scan", help="which torch a code base needs, and what of it the backports cover")
    scan.add_argument(
        "paths", nargs="+", metavar="path", help="Python files, folders that are searched for them, installed packages"
    )
    scan.add_argument("--torch", help="a release such as 2.8: only what that one lacks (default: each that torchspan runs on)")
    scan.add_argument("--fix-requires", action="store_true", help="write the oldest torch that it runs on into pyproject.toml")
    add_json(scan)
    scan.set_defaults(command=_scan)


def _scan(options: argparse.Namespace) -> int:
    from torchspan.scan import scan
    from torchspan.scan._requires import fix_requires

    result = scan(options.paths, options.torch)
    values = result.to_dict()
    if options.fix_requires:
        values["requires"] = fix_requires(result, options.paths)
    show(options.json, values, lambda console: draw_scan(result, console))
    if options.fix_requires and not options.json:
        print(values["requires"])
    return result.exit_code


def draw_scan(result: Scan, console: Console) -> None:
    """Each cause on a line of its own, then what they come to."""
    lines = [("bold", result.summary)]
    lines[:0] = [("red", f"could not be read: {path}: {reason}") for path, reason in result.unreadable.items()]
    for standing, style in (("unknown", "dim"), ("guarded", "dim"), ("covered", ""), ("uncovered", "")):
        texts = result.texts(standing)
        lines[:0] = [("bold", standing), *((style, f"  {text}") for text in texts)] if texts else []
    for style, text in lines:
        console.print(text, style=style or None, highlight=False, markup=False, emoji=False, soft_wrap=True)
