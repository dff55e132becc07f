"""Regions: what is compiled, what stays outside, and what one compile serves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from torchspan.core.graph import Graph
from torchspan.core.program import Program
from torchspan.core.report import Report
from torchspan.passes._base import PassContext
from torchspan.passes._pipeline import Pipeline


class Recorder:
    """Compiles nothing, and keeps what it was given."""

    def __init__(self) -> None:
        self.modules: list[torch.fx.GraphModule] = []
        self.names: list[str] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: Sequence[Any], name: str) -> Any:
        assert len(inputs) == sum(node.op == "placeholder" for node in module.graph.nodes)
        self.modules.append(module)
        self.names.append(name)
        return module


def _targets(module: torch.fx.GraphModule) -> set[str]:
    return {str(node.target) for node in module.graph.nodes if node.op == "call_function"}


def test_the_modules_that_are_named_are_regions_of_forward_and_backward(graph: Graph) -> None:
    recorder = Recorder()
    after = Pipeline.parse("regional_inductor{modules=*.feed_forward}").run(graph, PassContext(compile_region=recorder))
    called = set().union(*map(_targets, recorder.modules))
    assert {"aten.silu.default", "aten.silu_backward.default", "aten.mm.default"} <= called
    assert "aten.silu.default" not in _targets(after.module)
    assert any("attention" in target or "softmax" in target for target in _targets(after.module))


def test_equal_regions_are_compiled_once(graph: Graph) -> None:
    recorder, report = Recorder(), Report()
    Pipeline.parse("regional_inductor{modules=*.feed_forward}").run(graph, PassContext(report, recorder))
    forward = [module for module in recorder.modules if "aten.silu.default" in _targets(module)]
    assert len(forward) == 1  # of two blocks
    (decision,) = report.decisions
    assert decision.choice == f"4 regions, {len(recorder.modules)} compiled" and len(recorder.modules) < 4


def test_collectives_stay_outside_of_regions(sharded: Any) -> None:
    recorder = Recorder()
    graph = sharded(4, 2)
    after = Pipeline.parse("regional_inductor{modules=*.feed_forward|*.attention}").run(
        graph, PassContext(compile_region=recorder)
    )
    assert recorder.modules and not any("c10d" in target for module in recorder.modules for target in _targets(module))
    assert after.num_collectives() == graph.num_collectives()


def test_without_regions_nothing_changes_and_it_is_said(graph: Graph) -> None:
    report, recorder = Report(), Recorder()
    after = Pipeline.parse("regional_inductor").run(graph, PassContext(report, recorder))
    assert recorder.modules == [] and len(after.module.graph.nodes) == len(graph.module.graph.nodes)
    assert report.decisions[0].choice == "nothing changed"


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_inductor_in_this_process_gives_the_gradients_of_eager(
    program: Program, graph: Graph, tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    report = Report()
    after = Pipeline.parse("regional_inductor{modules=layers.0.feed_forward|*.0.feed_forward}").run(graph, PassContext(report))
    assert report.attempts and all(attempt.outcome == "compiled" for attempt in report.attempts)
    state = [*program.state().values()]
    with torch.no_grad():
        expected, actual = graph.module(*state, *tokens), after.module(*state, *tokens)
    assert all(torch.allclose(actual, other, atol=1e-6, rtol=1e-4) for actual, other in zip(expected, actual))
