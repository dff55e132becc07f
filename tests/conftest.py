"""Shared by all tests: fresh processes, and which tests run on which torch."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_TORCH = "2.13.0"


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run code (or ``argv``) in a fresh Python process; fails with its output unless it exits with `expect`."""

    def run(
        code: str | None = None,
        *argv: str,
        env: dict[str, str] | None = None,
        expect: int | None = 0,
        timeout: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        arguments = list(argv)
        if code is not None:
            script = tmp_path / "program.py"
            script.write_text(textwrap.dedent(code))
            arguments = [str(script), *arguments]
        environ = {k: v for k, v in os.environ.items() if not k.startswith("TORCHSPAN")}
        environ |= {"OMP_NUM_THREADS": "1"} | (env or {})  # a small program spends most on threads that wait for each other
        done = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environ,
            cwd=tmp_path,
            check=False,
        )
        assert expect is None or done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine or this torch is not for."""
    elsewhere = pytest.mark.skip(reason=f"runs once, on torch {DEFAULT_TORCH}")
    no_gpu = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if item.get_closest_marker("once") and not torch.__version__.startswith(DEFAULT_TORCH):
            item.add_marker(elsewhere)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
