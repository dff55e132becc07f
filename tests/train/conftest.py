"""Launches of several ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def launch() -> Callable[..., str]:
    """Run a program (a script, or ``-m`` and a module) on `num_ranks` gloo ranks; its output, or a failure that shows it."""

    def run(num_ranks: int, *argv: str, timeout: float = 400) -> str:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("TORCHSPAN")}
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}", *argv],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done.stdout + done.stderr

    return run
