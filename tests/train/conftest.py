"""Launches of several ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def launch() -> Callable[..., str]:
    """Run a program (a script, or ``-m`` and a module) on `num_ranks` gloo ranks; its output, or a failure that shows it."""

    def run(num_ranks: int, *argv: str, timeout: float = 400) -> str:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("TORCHSPAN")}
        process = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}", *argv],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert process.returncode == 0, f"exit {process.returncode}\n{process.stdout[-3000:]}\n{process.stderr[-6000:]}"
        return process.stdout + process.stderr

    return run


@pytest.fixture(scope="session")
def ask_two_ranks(
    tmp_path_factory: pytest.TempPathFactory, launch: Callable[..., str]
) -> Callable[[str], list[dict[str, Any]]]:
    """Run the text of a program on two ranks; what each wrote as ``<rank>.json``.

    It is given a folder for that, and one for caches.
    """

    def ask(program: str) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("ranks")
        script = folder / "ranks.py"
        script.write_text(program)
        launch(2, str(script), str(folder), str(tmp_path_factory.mktemp("caches")))
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]

    return ask
