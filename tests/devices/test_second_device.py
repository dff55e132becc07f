"""Where the accelerator is neither CUDA nor a CPU, what is said to ``torch.cuda`` reaches it: seen on a real device of our own.

The device is in ``second_device/``; its work is done later, by threads of its own, and its memory cannot be read by the host.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
from pathlib import Path

import pytest

from conftest import Run

HERE = Path(__file__).parent
FOLDER = HERE / "second_device"
KNOWN: dict[str, str] = json.loads((FOLDER / "known.json").read_text())
CHECKS = FOLDER / "checks.py"
NAMES = [node.name for node in ast.parse(CHECKS.read_text()).body if isinstance(node, ast.FunctionDef) and node.decorator_list]
ENVIRON = {"SECOND_DEVICE_COUNT": "2", "PYTHONPATH": os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])}


def asked_of(run: Run, program: Path, **environ: str) -> dict[str, str]:
    """What a program of checks says of each."""
    process = run(None, "-W", "ignore", str(program), env=ENVIRON | environ, timeout=900)
    answer: dict[str, str] = json.loads(process.stdout.splitlines()[-1])
    return answer


@pytest.fixture(scope="module", autouse=True)
def the_device_can_be_built() -> None:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("there is no C++ compiler to build the device with")


@pytest.fixture(scope="module")
def outcomes(run_python_once: Run) -> dict[str, str]:
    return asked_of(run_python_once, CHECKS)


@pytest.mark.parametrize("name", NAMES)
def test_a_program_for_cuda_reaches_the_device(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == "", outcomes[name]


def test_double_precision_becomes_single_in_every_spelling_where_the_device_has_none(run_python: Run) -> None:
    result = asked_of(run_python, FOLDER / "checks_in_single.py", SECOND_DEVICE_FLOAT64="0")
    assert len(result) > 30 and {name: what for name, what in result.items() if what} == {}


def test_a_sample_of_the_constructs_runs(run_python: Run, tmp_path: Path) -> None:
    lines = (HERE / "cuda_constructs.jsonl").read_text().splitlines()
    named = {json.loads(line)["id"]: line for line in lines}
    chosen = {*list(named)[::7], "dist.nccl", "dist.ddp"} - set(KNOWN)
    sample = [named[name] for name in sorted(chosen)]
    (tmp_path / "sample.jsonl").write_text("\n".join(sample))
    process = run_python(None, "-W", "ignore", str(HERE / "run_constructs.py"), str(tmp_path / "sample.jsonl"), "--second")
    answer = json.loads(process.stdout.splitlines()[-1])
    assert len(answer) > 15 and {name: what for name, what in answer.items() if what} == {}


def test_torchspan_run_sends_a_program_there_which_gives_the_numbers_of_the_cpu(run_python: Run) -> None:
    program = str(HERE / "programs" / "prefetch_cuda.py")
    there = run_python(None, "-W", "ignore", "-m", "torchspan", "run", program, env=ENVIRON)
    by_hand = run_python(None, program, "cpu")
    assert there.stdout == by_hand.stdout and there.stdout.startswith("losses 0x")
    assert "second" in there.stderr


def test_a_tensor_there_takes_part_in_collectives_of_two_ranks(run_python: Run) -> None:
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = run_python(None, *ranks, str(FOLDER / "collectives.py"), env=ENVIRON | {"TORCHSPAN": "1"})
    assert process.stdout.count("right") == 2
