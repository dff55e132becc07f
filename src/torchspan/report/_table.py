"""The page as a table on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from torchspan.core.topics import Standing
from torchspan.report._page import File, Page, Statement

_SUMMARY = (
    ("files", "file", "files", "to port"),
    ("lines", "line", "lines", "that asked for a device"),
    ("calls", "request", "requests", "redirected"),
    ("simulated", "kind of request", "kinds of requests", "only simulated"),
    ("unsupported", "request", "requests", "unsupported"),
    ("without_portable_line", "line", "lines", "without a portable form"),
    ("nothing_to_do", "line", "lines", "with nothing to do"),
)


def draw_table(page: Page, console: Console) -> None:
    """Each line that is to be ported with what it asked for, file by file, and what they come to."""
    for file in page.files:
        if not file.is_installed:
            _draw_file(file, console)
    counts = ((page.summary[name], singular, plural, what) for name, singular, plural, what in _SUMMARY)
    summary = ", ".join(
        f"{count:,} {singular if count == 1 else plural} {what}" for count, singular, plural, what in counts if count
    )
    console.print(Text(summary or "no line asks for a device that is not here", "bold"))


def _draw_file(file: File, console: Console) -> None:
    console.print(Text(file.name, "bold"))
    if file.header:
        console.print(Text(f"  near its top: {'; '.join(file.header.splitlines())}", "italic"))
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for statement in file.statements:
        table.add_row(f"{statement.first}", f"{statement.count}×" if statement.is_reached else "-", _what(statement))
    console.print(table)


def _what(statement: Statement) -> Text:
    """The statement, what to write instead, and what it asked for; a Text, as brackets in it are no markup."""
    text = Text(_line(statement.source))
    if statement.portable is not None:
        text.append(f"\n→ {_line(statement.portable)}", "green")
    for entry in statement.entries:
        how = "simulated" if entry.standing is Standing.SIMULATED else f"→ {entry.given}"
        text.append(f"\n  {entry.asked} {how}: {entry.reason}", "dim")
    for note in statement.notes:
        text.append(f"\n  {note}", "yellow")
    return text


def _line(source: str) -> str:
    return " ".join(part.strip() for part in source.splitlines()) if source else "(the source cannot be read)"
