"""Reproductions of failed compiles, run in fresh processes; ``torchspan compile`` and ``explain`` as a user calls them."""

from __future__ import annotations

import json
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from torchspan.core.errors import InputError
from torchspan.diagnosis.repro import write_repro
from torchspan.jobs.budget import Budget
from torchspan.jobs.supervisor import Ending
from torchspan.regions.settings import Settings

pytestmark = pytest.mark.once  # minutes a torch

RunPython = Callable[..., subprocess.CompletedProcess[str]]

FAILING = """\
    import torch

    def refuses_sin(graph, inputs):
        for node in graph.graph.nodes:
            if node.target is torch.sin:
                raise NotImplementedError("sin has no kernel here")
        return graph.forward

    def step(x, y):
        x = (x + 1) * y
        x = torch.relu(x) - 2
        x = torch.sin(x) / 3
        return torch.cos(x) + x.sum()

    torch.set_num_threads(1)
    compiled = torch.compile(step, backend=refuses_sin)
    print("result", compiled(torch.ones(3, 5), torch.ones(5)).shape)
"""

BREAKING = """\
    import torch

    @torch.compile(backend="eager")
    def step(x, n):
        x = x.sin()
        torch._dynamo.graph_break()
        return x.cos() * n

    step(torch.ones(3), 1)
    step(torch.ones(3), 2)
"""


def test_a_failed_compile_leaves_a_small_program_that_fails_alike(run_python: RunPython, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(textwrap.dedent(FAILING))
    arguments = (
        "-m",
        "torchspan",
        "compile",
        "--budget-seconds",
        "240",
        "--profile",
        "out.html",
        "--repro",
        "out",
        "program.py",
    )
    process = run_python(None, *arguments)
    assert "result torch.Size([3, 5])" in process.stdout and "NotImplementedError" in process.stderr
    assert "operations)" in process.stderr and "sin has no kernel here" in (tmp_path / "out.html").read_text()
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    assert about["outcome"] == "failed" and about["versions"]["torch"] == torch.__version__
    assert [input_["shape"] for input_ in about["inputs"]] == [[3, 5], [5]] and about["settings"]["backend"] == "refuses_sin"
    assert about["graph"]["num_operations"] == 1 < about["graph"]["num_operations_before"]
    program = (tmp_path / "out" / "repro.py").read_text()
    assert "torchspan" not in program and "torch.relu" not in program
    again = run_python(None, str(tmp_path / "out" / "repro.py"), expect=1)
    assert "NotImplementedError: sin has no kernel here" in again.stderr


def test_explain_names_graphs_breaks_and_recompiles(run_python: RunPython, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(textwrap.dedent(BREAKING))
    process = run_python(None, "-m", "torchspan", "explain", "--json", "program.py")
    answer: dict[str, Any] = json.loads(process.stdout)
    assert answer["num_calls"] == 1
    assert [graph["num_operations"] for graph in answer["graphs"]] == [1, 2, 2]
    assert [Path(break_["site"]).name for break_ in answer["breaks"]] == ["program.py:6"]
    assert answer["graphs"][0]["site"].endswith("program.py:5") and answer["graphs"][0]["num_guards"] > 0
    assert answer["recompiles"] and all("n" in recompile["reason"] for recompile in answer["recompiles"])
    drawn = run_python(None, "-m", "torchspan", "explain", "program.py").stdout
    assert "1 graph breaks" in drawn and "program.py:6" in drawn


def test_what_went_well_needs_no_reproduction(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs no reproduction"):
        write_repro(b"", Settings(), Ending("compiled", 1.0), tmp_path, budget=Budget(seconds=1))
