"""Types are strict and the code is clean."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.once
@pytest.mark.parametrize("command", [["mypy"], ["ruff", "check", "."], ["ruff", "format", "--check", "."]], ids=" ".join)
def test_static_checks(command: list[str]) -> None:
    if command == ["mypy"] and sys.version_info[:2] != (3, 11):
        pytest.skip("types are checked as Python 3.10 has them; numpy's for this Python are written in a newer syntax")
    process = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
