"""Compiles that hang, told of and shown again: reproductions that run in a fresh process, and ``torchspan explain``."""

from __future__ import annotations

import json
import subprocess
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import torchspan
from torchspan.diagnosis.repro import write_repro
from torchspan.jobs.budget import Budget
from torchspan.regions.watch import Finished, watching

pytestmark = pytest.mark.once  # minutes a torch

RunPython = Callable[..., subprocess.CompletedProcess[str]]


def hangs_at_sin(graph: Any, inputs: Any) -> Any:
    for node in graph.graph.nodes:
        if node.target is torch.sin:
            time.sleep(1000)
    return graph.forward


def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.sin(x + y).relu()


def breaks(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x = x + y
    torch._dynamo.graph_break()
    return x.cos()


def failed(program: Callable[..., Any], inputs: tuple[torch.Tensor, ...], **arguments: Any) -> Finished:
    """The compile of a program, after it failed."""
    finished: list[Finished] = []
    with watching(finished.append):
        compiled = torchspan.compile(program, strategy="whole", **arguments)
        compiled(*inputs)
        while not finished:
            time.sleep(0.02)
    return finished[0]


def test_a_hang_leaves_a_program_that_hangs_alike_and_shows_where(run_python: RunPython, tmp_path: Path) -> None:
    finished = failed(step, (torch.ones(3, 5), torch.ones(5)), backend=hangs_at_sin, budget=Budget(seconds=4))
    repro = write_repro(finished.payload, finished.settings, finished.ending, tmp_path / "out", budget=Budget(seconds=10))
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    assert (repro.kind, about["outcome"], about["versions"]["torch"]) == ("graph", "timeout", torch.__version__)
    assert "in hangs_at_sin" in about["stack"] and about["settings"]["backend"] == "hangs_at_sin"
    assert [input_["shape"] for input_ in about["inputs"]] == [[3, 5], [5]]
    program = repro.program.read_text()
    assert "torch.sin" in program and "def hangs_at_sin" in program and "torchspan" not in program
    shown = run_python(None, str(repro.program), "3", expect=1)
    assert "Timeout (0:00:03)!" in shown.stderr and "in hangs_at_sin" in shown.stderr


def test_a_program_that_fails_in_no_graph_is_pickled_and_fails_alike_in_a_fresh_process(
    run_python: RunPython, tmp_path: Path
) -> None:
    finished = failed(breaks, (torch.ones(3), torch.ones(3)), backend="eager", fullgraph=True)
    repro = write_repro(finished.payload, finished.settings, finished.ending, tmp_path / "out", budget=Budget(seconds=30))
    assert repro.kind == "program" and (tmp_path / "out" / "program.pickle").exists()
    shown = run_python(None, str(repro.program), expect=1)
    assert "Unsupported" in shown.stderr and "in breaks" in shown.stderr


EXPLAINED = """\
    import time
    import torch

    @torch.compiler.assume_constant_result
    def constant():
        {hang}
        return 2

    @torch.compile
    def step(x):
        return x * constant()

    torch.set_num_threads(1)
    try:
        step(torch.ones(3))
    except Exception as error:
        print("swallowed", error)
"""


@pytest.mark.parametrize("hang", ["time.sleep(1000)", pytest.param("sum(range(10**13))", marks=pytest.mark.once)])
def test_explain_ends_a_compile_that_hangs_and_says_where(hang: str, run_python: RunPython, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(textwrap.dedent(EXPLAINED.format(hang=hang)))
    arguments = ("-m", "torchspan", "explain", "--json", "--seconds", "3", "program.py")
    process = run_python(None, *arguments, expect=1, timeout=120)
    assert "swallowed" not in process.stdout and "in constant" in process.stderr
    if "sum" in hang:  # C code that holds the GIL and looks for no signal: nothing but the end of the process helps
        assert "Timeout (0:00:06)!" in process.stderr
        return
    (hung,) = json.loads(process.stdout)["hung"]
    assert hung["seconds"] == 3 and hung["site"] == "program.py:11" and "in constant" in hung["where"]
    assert "a compile was not done after 3 s; it hung at program.py:11" in process.stderr
