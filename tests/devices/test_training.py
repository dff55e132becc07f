"""A training program for CUDA gives the numbers of the same program ported to the CPU by hand, to the last bit."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here: the program uses it")
PROGRAMS = Path(__file__).parent / "programs"


def test_a_cuda_trainer_gives_bitwise_what_its_port_gives(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    redirected = run_python(None, str(PROGRAMS / "train_cuda.py"), env={"TORCHSPAN": "1"})
    by_hand = run_python(None, str(PROGRAMS / "train_cpu.py"))
    assert redirected.stdout == by_hand.stdout
    assert redirected.stdout.startswith("losses 0x") and len(redirected.stdout.splitlines()[0].split()) == 19


def test_without_torchspan_the_cuda_trainer_does_not_run_here(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    run_python(None, str(PROGRAMS / "train_cuda.py"), expect=1)
