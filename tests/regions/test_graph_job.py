"""One graph of operators, compiled in a child and loaded here; the graph itself where that fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from torchspan.core.numerics import difference
from torchspan.core.report import Report
from torchspan.jobs.budget import Budget
from torchspan.regions.graph_job import build, compile_graph, describe

pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"  # torch 2.13, when inductor is imported
)


def _graph(x: torch.Tensor, y: torch.Tensor) -> GraphModule:
    table = torch.arange(8.0)

    def function(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = torch.nn.functional.gelu(x @ y).chunk(2, dim=1)
        return low + high * torch.full([4, 4], 2.0), (x + table).sum(dim=-1)

    return make_fx(function)(x, y)


def test_a_graph_is_the_same_after_a_description() -> None:
    x, y = torch.randn(4, 8), torch.randn(8, 8)
    graph = _graph(x, y)
    again = build(describe(graph))
    assert [node.name for node in again.graph.nodes] == [node.name for node in graph.graph.nodes]
    assert difference(list(again(x, y)), list(graph(x, y))) is None


def test_a_graph_is_compiled_in_a_child_and_an_equal_one_is_not_compiled_again(nothing_left: Callable[[], None]) -> None:
    x, y = torch.randn(4, 8), torch.randn(8, 8)
    graph, report = _graph(x, y), Report()
    compiled = compile_graph(graph, [x, y], budget=Budget(seconds=120), report=report, region="first")
    (attempt,) = report.attempts
    assert (attempt.region, attempt.strategy, attempt.outcome, attempt.cause) == ("first", "regional", "compiled", None)
    assert compiled is not graph and difference(list(compiled(x, y)), list(graph(x, y))) is None
    assert compile_graph(_graph(x, y), [x, y], report=report, region="second") is compiled
    assert len(report.attempts) == 1 and report.decisions[0].choice == "shared"
    nothing_left()


def test_a_graph_that_does_not_compile_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    x = torch.randn(5)
    graph, report = make_fx(lambda x: (x.sin() + 1,))(x), Report()
    assert compile_graph(graph, [x], budget=Budget(seconds=60), report=report) is graph
    (attempt,) = report.attempts
    assert attempt.outcome == "failed" and "no C++ compiler" in (attempt.cause or "")


def test_symbols_for_sizes_are_refused_with_an_attempt() -> None:
    x = torch.randn(5)
    graph, report = make_fx(lambda x: (x + 1,))(x), Report()
    assert compile_graph(graph, ["not an input"], report=report) is graph
    assert "a tensor or a plain number, not str" in (report.attempts[0].cause or "")
