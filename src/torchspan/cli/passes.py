"""``torchspan passes``: the passes over a graph, and their options."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from rich.console import Console

from torchspan.cli.drawing import new_console, new_table, show
from torchspan.cli.parser import add_json


def add(commands: Any) -> None:
    """Declare the command."""
    passes = commands.add_parser("passes", help="the passes over a graph, and their options")
    add_json(passes)
    passes.add_argument(
        "--replay",
        type=Path,
        metavar="FILE",
        help="run the pass again that failed and left FILE; this runs FILE as a program: take it from whom you trust",
    )
    passes.set_defaults(command=_passes)


def _passes(options: argparse.Namespace) -> int:
    from torchspan.passes import describe_passes

    if options.replay is not None:
        return _replay(options.replay)
    rows = describe_passes()

    def draw(console: Console) -> None:
        table = new_table("pass", "what it does", "numbers", "options")
        table.columns[0].no_wrap = True
        for stage, group in itertools.groupby(rows, key=lambda row: row["stage"] or "any"):
            table.add_row(f"[bold]{stage}[/]")
            for row in group:
                options = ", ".join(f"{name}={value}" for name, value in row["options"].items()) or "none"
                table.add_row(f"  {row['name']}", row["summary"], row["claim"], options)
        console.print(table)
        console.print("Passes of a pipeline stand in the order of their stages.", style="dim")

    show(options.json, rows, draw)
    return 0


def _replay(path: Path) -> int:
    """Run a recorded pass again: what it raises is shown as any error, else what it was recorded with is told."""
    import torch

    from torchspan.passes._replay import load_recording

    recording = load_recording(path)
    graph, console = recording.graph, new_console()
    lines = [
        f"pass {recording.written} on a graph of {len(graph.module.graph.nodes)} nodes, recorded with torch {recording.torch}"
    ]
    if recording.torch != torch.__version__:
        lines.append(f"this is torch {torch.__version__}")
    console.print("\n".join(lines), markup=False, highlight=False)
    recording.replay()
    console.print(f"it does not fail here; where it was recorded: {recording.error}", markup=False, highlight=False)
    return 0
