"""The fourteen verification snippets of the reference text run as they stand there, under TORCHSPAN=1."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "reference_snippets"
SNIPPETS = sorted(path.stem for path in FOLDER.glob("*.txt"))

# Forks a process for each snippet once torch is imported with torchspan active: `python snippet.py`, 14 imports cheaper.
RUNNER = """
import os, runpy, sys, traceback
import torch
import torch._inductor.compile_fx
for path in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        status = 0
        try:
            runpy.run_path(path, run_name="__main__")
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    print("STATUS", os.path.basename(path), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, int], str]:
    folder = tmp_path_factory.mktemp("snippets")
    for name in SNIPPETS:
        (folder / f"{name}.py").write_text((FOLDER / f"{name}.txt").read_text())
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCHSPAN")}
    environment |= {"TORCHSPAN": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RUNNER), *(str(folder / f"{name}.py") for name in SNIPPETS)],
        capture_output=True,
        text=True,
        timeout=400,
        env=environment,
        cwd=folder,
        check=False,
    )
    lines = [line.split() for line in process.stdout.splitlines() if line.startswith("STATUS ")]
    return {name.removesuffix(".py"): int(status) for _, name, status in lines}, process.stdout + process.stderr


def test_there_are_fourteen_snippets() -> None:
    assert len(SNIPPETS) == 14


@pytest.mark.parametrize("name", SNIPPETS)
def test_a_snippet_of_the_reference_passes_without_an_edit(name: str, results: tuple[dict[str, int], str]) -> None:
    statuses, output = results
    assert statuses.get(name) == 0, output


def test_a_snippet_passes_in_a_process_of_its_own(run_python: Callable[..., object]) -> None:
    run_python((FOLDER / "test_todo_11_e2e_backward.txt").read_text(), env={"TORCHSPAN": "1"})
