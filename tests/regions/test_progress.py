"""The progress of a compile that somebody waits for, on standard error."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from torchspan.core.errors import InputError
from torchspan.jobs.budget import Budget
from torchspan.strategies._compile import compile_bounded

pytestmark = pytest.mark.once
SCRIPT = """
import torch, torchspan
from torchspan.jobs.supervisor import end_servers
compiled = torchspan.compile(torch.nn.GELU(), wait=True, handback="caches", budget=torchspan.Budget(seconds=200))
compiled(torch.randn(64))
end_servers()
"""


def test_each_phase_is_a_line_where_standard_error_is_no_terminal(capfd: Any) -> None:
    compiled = compile_bounded(
        torch.nn.Linear(4, 4), strategy="whole", handback="caches", wait=True, progress=True, budget=Budget(seconds=200)
    )
    compiled(torch.randn(3, 4))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("torchspan: compiling Linear (whole): ")]
    phases = [line.split(": ")[2].split(",")[0] for line in lines]
    assert {"dynamo", "inductor", "c++"} <= set(phases), lines
    assert re.fullmatch(r"torchspan: compiling Linear \(whole\): [a-z+]+, after [0-9.]+ s, [0-9.]+ [KMG]iB", lines[-1])


def test_nothing_is_shown_unless_asked_for_or_on_a_terminal(capfd: Any) -> None:
    compile_bounded(torch.sin, strategy="whole", backend="eager", wait=True)(torch.ones(2))
    assert "compiling" not in capfd.readouterr().err
    with pytest.raises(InputError, match="goes with wait=True"):
        compile_bounded(torch.sin, progress=True)


def test_on_a_terminal_one_line_moves_with_phase_seconds_and_memory() -> None:
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    )
    os.close(theirs)
    output = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux says so when the other side is closed
            break
        if not chunk:
            break
        output += chunk
    os.close(ours)
    assert child.wait() == 0, output.decode()
    text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", output).decode()
    assert re.search(r"compiling GELU \(whole\): inductor .* [0-9]+ of [0-9]+ s, [0-9.]+ MiB of 8.0 GiB", text), text[-2000:]
