"""Every test here runs against torch's own where it has it, and against the backport where it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from torchspan.backports._base import all_backports
from torchspan.environment.scope import Environment


@pytest.fixture
def environment() -> Iterator[Environment]:
    """All backports in force; on a torch that has everything they change nothing."""
    with Environment([patch for backport in all_backports() for patch in backport.patches()]) as environment:
        yield environment
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture(scope="module")
def failures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[str]]]:
    """What failed where this file's QUESTIONS were put to real ranks: by their number (as text), by question."""
    answers = tmp_path_factory.mktemp("ranks") / "answers.json"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TORCHSPAN")} | {"OMP_NUM_THREADS": "1"}
    argv = [sys.executable, str(Path(__file__).with_name("_ranks.py")), str(request.path), str(answers)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=400, env=environ, check=False)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return json.loads(answers.read_text())
