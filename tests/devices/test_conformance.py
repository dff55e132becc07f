"""Each construct of the list runs on a machine without a GPU, in the default mode; what asks for an answer, in disguise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LIST = HERE / "cuda_constructs.jsonl"
CONSTRUCTS = [json.loads(line) for line in LIST.read_text().splitlines()]
XFAILS = json.loads((HERE / "xfails.json").read_text())


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("constructs")
    command = [sys.executable, "-W", "ignore", str(HERE / "run_constructs.py"), str(LIST)]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("TORCHSPAN")}
    environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    process = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environ, check=False)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize("construct", CONSTRUCTS, ids=[construct["id"] for construct in CONSTRUCTS])
def test_a_construct_runs(construct: dict[str, str], outcomes: dict[str, str], request: pytest.FixtureRequest) -> None:
    if construct["id"] in XFAILS:
        request.applymarker(pytest.mark.xfail(strict=True, reason=XFAILS[construct["id"]]))
    assert outcomes[construct["id"]] == "", outcomes[construct["id"]]


def test_every_known_gap_is_a_construct() -> None:
    assert set(XFAILS) <= {construct["id"] for construct in CONSTRUCTS}
