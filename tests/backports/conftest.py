"""Every test here runs against torch's own where it has it, and against the backport where it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from torchspan.backports._base import all_backports, get_backport
from torchspan.environment.scope import Environment

FIRST_FORMS = Path(__file__).with_name("first_forms.txt")


def first_forms() -> list[tuple[list[str], str, str]]:
    """Of each line of first_forms.txt: the releases (as 2.10), the beginning of the tests' names, the backport."""
    lines = [line.partition(" | ") for line in FIRST_FORMS.read_text().splitlines() if line and not line.startswith("#")]
    entries = [(*line.split(maxsplit=1), named) for line, _, named in lines]
    return [(releases.split(","), test, named or test.partition(".")[0][5:]) for releases, test, named in entries]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this torch has in a first form."""
    release = ".".join(torch.__version__.split(".")[:2])
    here = [(test, get_backport(name).first_form(release)) for releases, test, name in first_forms() if release in releases]
    for item in items:
        name = item.nodeid.removeprefix("tests/backports/")
        for test, otherwise in here:
            if name.startswith(test):
                item.add_marker(pytest.mark.skip(reason=f"torch {release}'s own, a first form: {otherwise}"))


@pytest.fixture
def skipped_first_forms() -> list[tuple[list[str], str, str]]:
    """The lines of first_forms.txt."""
    return first_forms()


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
    process = subprocess.run(argv, capture_output=True, text=True, timeout=400, env=environ, check=False)
    assert process.returncode == 0, f"exit {process.returncode}\n{process.stdout[-3000:]}\n{process.stderr[-6000:]}"
    return json.loads(answers.read_text())
