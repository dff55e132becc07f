"""``torchspan port``: the ported program, what is left of it, and that it prints what the original prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PORT = ("-m", "torchspan", "port")
TRAIN = """\
import argparse
import torch
from layers.noise import noise

torch.manual_seed(0)
model = torch.nn.Linear(4, 1).cuda()
print(argparse.ArgumentParser().parse_known_args()[1], model(noise(2)).sum().item())
print(model.weight.to(0).sum().item())
"""
# Ten of tools/port_programs.py's, one of each kind.
PROGRAMS = (
    "device_type_of_text",
    "modulo_inside_the_text",
    "prefetcher",
    "fork_rng_devices",
    "group_with_device_by_rank",
    "device_parameter_with_another_meaning",
    "device_bound_later",
    "amp_training",
    "multi_line_call",
    "portable_already",
)


def write(folder: Path, text: str = TRAIN) -> None:
    (folder / "layers").mkdir()
    (folder / "layers" / "__init__.py").write_text("")
    (folder / "layers" / "noise.py").write_text("import torch\ndef noise(n):\n    return torch.randn(n, 4, device='cuda')\n")
    (folder / "train.py").write_text(text)


def test_both_run_and_print_the_same(run_python, tmp_path: Path) -> None:
    write(tmp_path)
    process = run_python(None, *PORT, "train.py", "-o", "ported", "--diff", "--check", "--", "--epochs", "3")
    assert "+model = torch.nn.Linear(4, 1).to(device)" in process.stdout.splitlines()
    assert "3 statements replaced, 0 left to do by hand" in process.stderr
    assert "both ran: exit code 0, the same 2 lines of output" in process.stderr
    ported = (tmp_path / "ported" / "train.py").read_text()
    assert "cuda" not in ported and "cuda" not in (tmp_path / "ported" / "layers" / "noise.py").read_text()
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "apply", "-"], input=process.stdout, text=True, cwd=tmp_path, check=True)
    assert (tmp_path / "train.py").read_text() == ported


def test_a_difference_is_shown_and_is_the_exit_code(run_python, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import torch\nx = torch.ones(1).cuda()\nprint(torch.cuda.is_available(), x)\n")
    process = run_python(None, *PORT, "train.py", "--check", expect=1)
    assert "-True tensor([1.])" in process.stderr and "+False tensor([1.])" in process.stderr
    assert "the two do not print the same" in process.stderr


@pytest.mark.once
def test_what_is_left_is_named_and_is_the_exit_code(run_python, tmp_path: Path) -> None:
    write(tmp_path, TRAIN + "event = torch.cuda.Event()\n")
    process = run_python(None, *PORT, "train.py", "-o", "out.py", expect=1)
    assert process.stdout == "" and "train.py:9: by hand: event = torch.cuda.Event()" in process.stderr
    assert "not written: layers/noise.py" in process.stderr
    assert (tmp_path / "out.py").read_text().endswith("to(device).sum().item())\nevent = torch.cuda.Event()\n")


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("gone.py",), "no file 'gone.py'"),
        (("train.py", "-o", "train.py"), "'train.py' is the program itself"),
        (("train.py", "-o", "no/out.py"), "there is no folder 'no'"),
        (("train.py", "--", "--epochs", "1"), "expected '--check'"),
        (("broken.py",), "is no Python that this Python reads"),
    ],
)
def test_a_mistake_is_one_line(run_python, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    write(tmp_path)
    (tmp_path / "broken.py").write_text("x = (")
    process = run_python(None, *PORT, *arguments, expect=2)
    assert words in process.stderr and len(process.stderr.splitlines()) == 1


def test_programs_that_are_ported_print_what_they_did(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "port_programs.py"), *PROGRAMS]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert process.returncode == 0, process.stderr
    outcomes = json.loads(process.stdout.splitlines()[-1])
    assert {name: outcome["outcome"] for name, outcome in outcomes.items()} == dict.fromkeys(PROGRAMS, "same"), process.stderr
