"""Where the accelerator is neither CUDA nor a CPU, what is said to ``torch.cuda`` reaches it: seen on a real device of our own.

The device is in ``second_device/``; its work is done later, by threads of its own, and its memory cannot be read by the host.
"""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest

from conftest import Run

FOLDER = Path(__file__).parent / "second_device"
CHECKS = FOLDER / "checks.py"
NAMES = [node.name for node in ast.parse(CHECKS.read_text()).body if isinstance(node, ast.FunctionDef) and node.decorator_list]
ENVIRON = {"SECOND_DEVICE_COUNT": "2", "PYTHONPATH": os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])}


def asked_of(run: Run, program: Path, **environ: str) -> dict[str, str]:
    """What a program of checks says of each."""
    done = run(None, "-W", "ignore", str(program), env=ENVIRON | environ, timeout=900)
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def outcomes(run_python_once: Run) -> dict[str, str]:
    return asked_of(run_python_once, CHECKS)


@pytest.mark.parametrize("name", NAMES)
def test_a_program_for_cuda_reaches_the_device(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == "", outcomes[name]


def test_double_precision_becomes_single_in_every_spelling_where_the_device_has_none(run_python: Run) -> None:
    found = asked_of(run_python, FOLDER / "checks_in_single.py", SECOND_DEVICE_FLOAT64="0")
    assert len(found) > 30 and {name: what for name, what in found.items() if what} == {}
