"""The pages that say how to write a plug-in: their snippets are run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.once
@pytest.mark.parametrize(
    ("page", "printed"),
    [
        ("writing_a_backport.md", "special_double comes and goes"),
        ("writing_a_device_rule.md", "torch.cuda.cooling_level() → simulated (nothing here is warm)"),
    ],
)
def test_what_a_page_shows_is_run(page: str, printed: str, run_python: Callable[..., Any]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    assert printed in run_python("\n".join(blocks)).stdout


@pytest.mark.once
def test_the_levels_on_the_page_are_those_that_are_checked() -> None:
    from test_layering import LEVELS

    rows = re.findall(r"^\| (\d) \| (.*?) \|", (DOCS / "architecture.md").read_text(), flags=re.MULTILINE)
    shown = {folder: int(level) for level, folders in rows for folder in re.findall(r"`(\w+)`", folders)}
    known = {folder: level for level, folders in enumerate(LEVELS) for folder in folders - {"__main__", "__init__"}}
    assert shown == known
