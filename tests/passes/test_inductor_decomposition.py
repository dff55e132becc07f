"""Decomposition: what is taken apart, what stays whole, and what the new nodes know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from torchspan.capture.train_step import capture_train_step
from torchspan.core.graph import Graph, InputSpec, OutputSpec
from torchspan.core.program import Program
from torchspan.core.report import Report
from torchspan.passes._base import PassContext
from torchspan.passes._pipeline import Pipeline

# importing inductor, from which the table comes
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
PIPELINE = Pipeline.parse("inductor_decomposition")


def _within(results: Any, expected: Any, tolerance: float = 1e-5) -> bool:
    return all(
        (actual - other).abs().max() <= tolerance * other.abs().max() for actual, other in zip(results, expected, strict=True)
    )


def test_operators_of_the_table_are_taken_apart_and_numbers_stay(program: Program, graph: Graph, tokens: Any) -> None:
    report = Report()
    after = PIPELINE.run(graph, PassContext(report))
    before, result = graph.count_targets(), after.count_targets()
    assert before["aten.t.default"] and not result["aten.t.default"] and result["aten.permute.default"]
    assert not result["aten.silu_backward.default"] or not before["aten.silu_backward.default"]
    (decision,) = report.decisions
    assert "operators taken apart" in decision.choice
    state = [*program.state().values()]
    with torch.no_grad():
        assert _within(after.module(*state, *tokens), graph.module(*state, *tokens))


def test_new_nodes_know_module_and_shape_and_gradients_keep_their_marks(program: Program) -> None:
    optimizer = torch.optim.AdamW(program.target.parameters(), lr=0.1)  # type: ignore[union-attr]
    graph = capture_train_step(program, optimizer=optimizer)
    after = PIPELINE.run(graph)
    assert after.gradients().values() and sorted(after.gradients().values()) == sorted(graph.gradients().values())
    permutes = [node for node in after.module.graph.nodes if str(node.target) == "aten.permute.default"]
    assert any("layers.1.attention" in node.meta["custom"]["module"] for node in permutes)
    assert {node.meta["custom"].get("phase") for node in permutes} == {
        node.meta["custom"].get("phase") for node in graph.module.graph.nodes if str(node.target) == "aten.t.default"
    }
    assert all("val" in node.meta for node in after.module.graph.nodes if node.op == "call_function")


def test_random_numbers_are_those_of_the_graph_before() -> None:
    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        dropped, _ = torch.native_dropout(x, 0.5, True)
        return dropped.t(), torch.bernoulli(x)

    x = torch.full((8, 4), 0.5)
    module = make_fx(step, tracing_mode="fake")(x)
    graph = Graph(module, (InputSpec("input", "x"),), (OutputSpec("output", "0"), OutputSpec("output", "1")))
    after = PIPELINE.run(graph)
    assert {"aten.native_dropout.default", "aten.bernoulli.default", "aten.permute.default"} <= set(after.count_targets())
    results = []
    for each_graph in (graph, after):
        torch.manual_seed(3)
        results.append(each_graph.module(x))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class _Prefix(nn.Module):
    """The loss of as many rows as `count` says: a size that depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        n = count.sum().item()
        torch._check(n >= 0)
        torch._check(n <= 8)
        rows = self.linear(x.index_select(0, torch.arange(n)))
        return nn.functional.gelu(rows).square().sum()


def test_sizes_that_depend_on_data_stay_symbols() -> None:
    module = _Prefix()
    graph = capture_train_step(Program(module, (torch.ones(8, 4), torch.tensor([3]))))
    after = PIPELINE.run(graph)
    assert after.count_targets()["aten.gelu.default"] == 0 < graph.count_targets()["aten.gelu.default"]
    state = [parameter.detach() for parameter in module.parameters()]
    for count in (2, 5):
        arguments = (torch.randn(8, 4), torch.tensor([count]))
        assert _within(after.module(*state, *arguments), graph.module(*state, *arguments))


def test_collectives_stay(sharded: Any) -> None:
    graph = sharded(4, 2)
    after = PIPELINE.run(graph)
    assert after.num_collectives() == graph.num_collectives() and after.count_targets() != graph.count_targets()
