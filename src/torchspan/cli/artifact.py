"""``torchspan artifact``: look into artifacts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from torchspan.cli.drawing import new_table, pairs, show
from torchspan.cli.parser import add_json
from torchspan.core.text import format_bytes


def add(commands: Any) -> None:
    """Declare the command."""
    artifact = commands.add_parser("artifact", help="look into artifacts: show, verify, diff")
    actions = artifact.add_subparsers(dest="action", required=True, metavar="show|verify|diff")
    look = actions.add_parser("show", help="what its manifest says; nothing else in it is opened")
    verify = actions.add_parser("verify", help="whether it is whole, signed, and fits this machine")
    verify.add_argument("--trusted-key", type=Path, action="append", default=[], metavar="KEY", help="who may have signed it")
    for parser, command in ((look, _show), (verify, _verify)):
        parser.add_argument("file", type=Path)
        parser.set_defaults(command=command)
    diff = actions.add_parser("diff", help="which entries and payloads differ; the exit code is 1 if any do")
    diff.add_argument("first", type=Path)
    diff.add_argument("second", type=Path)
    diff.set_defaults(command=_diff)
    for parser in (look, verify, diff):
        add_json(parser)


def _show(options: argparse.Namespace) -> int:
    from torchspan.artifacts import describe

    description = describe(options.file)

    def draw(console: Console) -> None:
        console.print(
            f"[bold]{escape(description['path'])}[/], signed by {description['signed_by'] or 'nobody'}", highlight=False
        )
        console.print(pairs({name: _brief(value) for name, value in description["entries"].items()}))
        table = new_table("payload", "size", "SHA-256")
        for payload in description["payloads"]:
            table.add_row(payload["name"], format_bytes(payload["size"]), payload["sha256"][:16])
        console.print(table)

    show(options.json, description, draw)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from torchspan.artifacts import read_key, verify

    result = verify(options.file, [read_key(path) for path in options.trusted_key] or None)

    def draw(console: Console) -> None:
        whole = f"{result['payloads']} payloads, {format_bytes(result['bytes'])}, are as they were written"
        console.print(f"{result['path']}: {whole}; signed by {result['signed_by'] or 'nobody'}", highlight=False, markup=False)
        if result["differs"]:
            console.print("It does not fit here:")
            console.print(pairs(result["differs"]))
        else:
            console.print("It fits this torch and this machine.")

    show(options.json, result, draw)
    return int(bool(result["differs"]))


def _diff(options: argparse.Namespace) -> int:
    from torchspan.artifacts import diff

    differences = diff(options.first, options.second)
    is_same = not (differences["entries"] or differences["payloads"])

    def draw(console: Console) -> None:
        if is_same:
            console.print("the same entries and payloads")
            return
        table = new_table("differs", str(options.first), str(options.second))
        for name, (left, right) in differences["entries"].items():
            table.add_row(name, _brief(left), _brief(right))
        for name, digests in differences["payloads"].items():
            table.add_row(name, *("not there" if digest is None else digest[:16] for digest in digests))
        console.print(table)

    show(options.json, differences, draw)
    return int(not is_same)


def _brief(value: Any) -> str:
    """An entry of a manifest in at most two hundred characters."""
    text = value if isinstance(value, str) else json.dumps(value)
    return escape(text if len(text) <= 200 else f"{text[:200]} … ({len(text)} characters)")
