"""The second start of a program: it loads what the first one compiled, within its first steps, and compiles nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

Run = Callable[..., "CompletedProcess[str]"]

HELPER = "import torch\ndef twice(x):\n    return torch.tanh(x) * {factor}\n"
PROGRAM = """
import json, sys, time
import torch, torchspan
from torch import nn
from helper import twice

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        for name in ("first", "second", "third"):  # names in a set, which each process pickles in another order
            self.register_buffer(name, torch.ones(8), persistent=False)
    def forward(self, x):
        return twice(self.linear(x) * self.first)

def settled(compiled, call):
    calls, start = 0, time.monotonic()
    while time.monotonic() - start < 200 and "swap_stall_s" not in compiled.report.figures:
        call()
        calls += 1
        time.sleep(0.02 if calls > 3 else 0)
    return calls

torch.manual_seed(0)
trained, served = Scaled(), Scaled()
found = {}
x = torch.randn(4, 8)
compiled = torchspan.compile(trained, strategy="whole")
found["trained"] = settled(compiled, lambda: compiled(x).sum().backward())
reports = [compiled.report]
with torch.no_grad():
    evaluated = torchspan.compile(served, strategy="whole")
    found["served"] = settled(evaluated, lambda: evaluated(x))
    found["right"] = torch.allclose(evaluated(x), served(x))
found["right"] &= torch.allclose(compiled(x), trained(x))
reports.append(evaluated.report)
found["outcomes"] = [[one.outcome for one in report.attempts] for report in reports]
found["choices"] = [[f"{one.choice}: {one.reason}" for one in report.decisions] for report in reports]
print(json.dumps(found))
"""


def started(run_python: Run, folder: Path, factor: int) -> dict[str, Any]:
    """What one run of the program found, with a helper that multiplies by `factor`."""
    (folder / "helper.py").write_text(HELPER.format(factor=factor))
    environ = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    answer: dict[str, Any] = json.loads(run_python(PROGRAM, env=environ).stdout.splitlines()[-1])
    assert answer["right"]
    return answer


def test_the_second_start_loads_and_one_after_a_change_compiles(run_python: Run, tmp_path: Path) -> None:
    first = started(run_python, tmp_path, 2)
    assert first["outcomes"] == [["compiled"], ["compiled"]]
    second = started(run_python, tmp_path, 2)
    assert second["outcomes"] == [["loaded"], ["loaded"]], second["choices"]
    assert max(second["trained"], second["served"]) <= 3

    for record in (tmp_path / "cache" / "torchspan" / "starts").iterdir():  # of one of the two, a bit is wrong
        if record.name.endswith("artifact"):
            content = record.read_bytes()
            record.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    third = started(run_python, tmp_path, 3)
    assert third["outcomes"] == [["compiled"], ["compiled"]]  # its helper is not what was compiled
    assert started(run_python, tmp_path, 3)["outcomes"] == [["loaded"], ["loaded"]]
