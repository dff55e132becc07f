"""profile_compile: real compiles, one that hangs and one that fails; what is written of them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchspan.core.errors import InputError
from torchspan.diagnosis.profiling import profile_compile
from torchspan.jobs.budget import Budget

LONG = Budget(seconds=240)


def two_graphs(x: torch.Tensor) -> torch.Tensor:
    x = x.sin() + 1
    torch._dynamo.graph_break()
    return x.cos().sum()


def a_backend_that_hangs(graph: Any, inputs: Any) -> Any:
    while True:
        time.sleep(0.1)


def a_backend_that_fails(graph: Any, inputs: Any) -> Any:
    raise ValueError("no kernel for this one")


@pytest.mark.slow
def test_inductors_phases_graphs_and_memory_are_measured(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    profile = profile_compile(model, torch.ones(2, 8), budget=LONG)
    assert profile.outcome == "compiled", profile.cause
    for phase in ("start", "dynamo", "aot", "inductor", "c++"):
        assert profile.seconds_in(phase) > 0, phase
    assert sum(phase.seconds for phase in profile.phases) == pytest.approx(profile.seconds, rel=0.05)
    assert profile.peak_bytes is not None and profile.peak_bytes > 10**8
    assert max(phase.peak_bytes or 0 for phase in profile.phases) <= profile.peak_bytes
    (graph,) = profile.graphs
    assert graph.num_operations == 2 and graph.num_guards > 0
    assert 0 < graph.seconds["c++"] <= profile.seconds_in("c++") + 1e-6
    trace = json.loads(profile.save_trace(tmp_path / "trace.json").read_text())
    files = [event for event in trace["traceEvents"] if event["name"] == "compile_file"]
    assert files and all(event["ph"] == "X" and event["cat"] == "c++" and event["dur"] > 0 for event in files)
    assert any(event["ph"] == "C" and event["args"]["bytes"] > 0 for event in trace["traceEvents"])
    assert json.loads(json.dumps(profile.to_dict()))["graphs"][0]["num_operations"] == 2
    page = profile.save_html(tmp_path / "page.html").read_text()
    assert "AOTAutograd" in page and "<script" not in page and "compile_file" in page


def test_each_graph_and_what_ended_it_early_is_named() -> None:
    profile = profile_compile(two_graphs, (torch.ones(3),), backend="eager", budget=LONG)
    assert profile.outcome == "compiled", profile.cause
    assert [graph.num_operations for graph in profile.graphs] == [2, 2]
    first = two_graphs.__code__.co_firstlineno
    assert profile.graphs[0].site == f"{__file__}:{first + 1}" and profile.graphs[0].function == "two_graphs"
    assert [break_.site for break_ in profile.breaks] == [f"{__file__}:{first + 2}"]
    assert profile.seconds_in("c++") == 0 and profile.settings["backend"] == "eager"


def test_a_backend_that_hangs_is_ended_and_its_stack_is_there(nothing_left: Any, tmp_path: Path) -> None:
    profile = profile_compile(two_graphs, {"x": torch.ones(3)}, backend=a_backend_that_hangs, budget=Budget(seconds=10))
    assert profile.outcome == "timeout" and profile.seconds < 15
    assert "a_backend_that_hangs" in (profile.stack or "") and "a_backend_that_hangs" in (profile.where or "")
    assert profile.open_events[0] == "dynamo" and profile.open_events[-1] == "backend_compile"
    assert profile.seconds_in("backend") > 1 and profile.graphs[0].num_operations == 2
    page = profile.save_html(tmp_path / "page.html").read_text()
    assert "never ended" in page and "a_backend_that_hangs" in page
    nothing_left()


@pytest.mark.once
def test_a_tool_that_hangs_is_named(tmp_path: Path) -> None:
    from torch._inductor import config

    compiler = tmp_path / "stuck-g++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *--version*|*-dumpversion*) exec g++ "$@";; esac\nexec sleep 600\n')
    compiler.chmod(0o755)
    with config.patch({"cpp.cxx": (str(compiler),)}):
        profile = profile_compile(lambda x: x.sin() + 1, torch.ones(3), budget=Budget(seconds=25))
    assert profile.outcome == "timeout"
    assert any("sleep 600" in command for command in profile.commands), profile.commands


def test_a_backend_that_fails_says_so() -> None:
    profile = profile_compile(two_graphs, torch.ones(3), backend=a_backend_that_fails, budget=LONG)
    assert profile.outcome == "failed" and "no kernel for this one" in (profile.cause or "")
    assert "a_backend_that_fails" in (profile.stack or "") and profile.graphs[0].function == "two_graphs"


def test_what_cannot_be_profiled_or_written_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a module or a function, not int"):
        profile_compile(3, torch.ones(1))  # type: ignore[arg-type]
    profile = profile_compile(two_graphs, torch.ones(3), backend="eager", budget=LONG)
    with pytest.raises(InputError, match="no folder"):
        profile.save_html(tmp_path / "missing" / "page.html")
