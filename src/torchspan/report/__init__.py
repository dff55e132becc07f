"""The migration report: what a run changed, as a page that a person ports a program by, as JSON and as a table."""

from __future__ import annotations

import json
from pathlib import Path

from torchspan.report._html import to_html
from torchspan.report._page import Page, Run, make_page
from torchspan.report._parts import write_part
from torchspan.report._port import Ported, port_program, write_ported
from torchspan.report._proof import Proof, prove
from torchspan.report._recording import Recording, rank_of_world, report_path
from torchspan.report._table import draw_table

__all__ = [
    "Page",
    "Ported",
    "Proof",
    "Recording",
    "Run",
    "draw_table",
    "make_page",
    "port_program",
    "prove",
    "rank_of_world",
    "report_path",
    "write_page",
    "write_part",
    "write_ported",
]


def write_page(page: Page, path: Path) -> None:
    """Write the page to `path`: HTML where its name ends in ``.html`` or ``.htm``, else JSON."""
    is_html = path.suffix.lower() in (".html", ".htm")
    text = to_html(page) if is_html else json.dumps(page.to_dict(), indent=1)
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
