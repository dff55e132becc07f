"""What the page on migration shows, before and after, is run in order, in one process."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "precompile_migration.md"
CHECK = """
expected = model(x)
torch.testing.assert_close(y, expected)
model.zero_grad()
again(model, x, target)
found = [parameter.grad.clone() for parameter in model.parameters()]
model.zero_grad()
torch.testing.assert_close(loss, step(model, x, target).detach())
torch.testing.assert_close(found, [parameter.grad for parameter in model.parameters()])
"""


@pytest.mark.slow
@pytest.mark.once
def test_the_page_runs_and_the_older_calls_are_pointed_out(run_python) -> None:
    blocks = re.findall(r"```python[ \w]*\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 5
    process = run_python("\n".join([*blocks, CHECK]), env={"TORCHSPAN": "1"})
    assert "save_compiled_function is the older way to compile ahead of time; write torchspan.precompile" in process.stderr
