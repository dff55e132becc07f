"""Drawing on a terminal: a Report, tables, pairs of a name and a value."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from torchspan.core.report import Attempt, Decision, Report
from torchspan.core.text import format_bytes, format_figure
from torchspan.core.topics import Topic


def new_console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; 110 columns where the output goes to a file."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=110)


def show(as_json: bool, values: Any, draw: Callable[[Console], None]) -> None:
    if as_json:
        print(json.dumps(values, indent=1))
    else:
        draw(new_console())


def new_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        is_number = column in ("times", "seconds", "peak memory")
        table.add_column(column, overflow="fold", no_wrap=column == "backport", justify="right" if is_number else "left")
    return table


def pairs(values: dict[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(name.replace("_", " "), value)
    return table


def short_site(site: str | None) -> str:
    if site is None:
        return ""
    path, _, line = site.rpartition(":")
    is_outside = os.path.isabs(path) and not path.startswith(os.getcwd() + os.sep)
    return f"{Path(path).name if is_outside else os.path.relpath(path)}:{line}"


def draw_report(report: Report, console: Console, only: Sequence[Topic] | None = None) -> None:
    """One screen: what was decided, grouped by topic (`only` these), what was tried, and what was measured."""
    decisions = [decision for decision in report.decisions if only is None or decision.topic in only]
    if not (decisions or report.attempts or report.figures):
        console.print("torchspan: nothing was changed", style="dim")
        return
    console.rule("[bold]torchspan", align="left")
    for topic in Topic:
        _draw_decisions(console, topic, [d for d in decisions if d.topic is topic])
    _draw_attempts(console, report.attempts)
    for name, value in report.figures.items():
        console.print(": ".join(format_figure(name, value)), highlight=False)


def _draw_decisions(console: Console, topic: Topic, decisions: Sequence[Decision]) -> None:
    """A topic's decisions, those with the same reason under it."""
    if not decisions:
        return
    console.print(f"[bold]{topic.heading}")
    width = min(40, max(len(decision.subject) for decision in decisions))
    for reason in dict.fromkeys(decision.reason for decision in decisions):
        console.print(f"  {reason}", style="italic", highlight=False, markup=False)
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(overflow="fold", width=width)
        table.add_column(overflow="fold", min_width=9)
        table.add_column(justify="right", no_wrap=True, min_width=5)
        table.add_column(overflow="fold")
        for decision in decisions:
            if decision.reason == reason:
                times = f"{decision.count}×" if decision.count > 1 else ""
                cells = (decision.subject, f"→ {decision.choice}", times, short_site(decision.site))
                table.add_row(*map(escape, cells))
        console.print(Padding(table, (0, 0, 0, 4)))


def _draw_attempts(console: Console, attempts: Sequence[Attempt]) -> None:
    if not attempts:
        return
    table = new_table("compile attempt", "strategy", "backend", "outcome", "seconds", "peak memory", "cause")
    for attempt in attempts:
        peak = format_bytes(attempt.peak_bytes) if attempt.peak_bytes else "-"
        cause = " ".join(filter(None, (attempt.cause, attempt.where and f"at {attempt.where}")))
        table.add_row(
            attempt.region, attempt.strategy, attempt.backend, attempt.outcome, f"{attempt.seconds:.1f}", peak, cause or "-"
        )
    console.print(table)
