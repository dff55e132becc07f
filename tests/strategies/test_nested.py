"""The whole program as one region in which torch compiles equal blocks once, as nested regions."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torchspan
from torchspan.core.numerics import difference
from torchspan.jobs.budget import Budget
from torchspan.strategies import report_of

Wait = Callable[..., None]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"  # torch 2.13, when inductor is imported
)


def takes_nested_graphs(graph: Any, inputs: Any) -> Any:
    if not any("invoke_subgraph" in str(node.target) for node in graph.graph.nodes):
        raise RuntimeError("there is no nested region")
    return graph.forward


def takes_flat_graphs(graph: Any, inputs: Any) -> Any:
    if any("invoke_subgraph" in str(node.target) for node in graph.graph.nodes):
        raise RuntimeError("there is a nested region")
    return graph.forward


def test_blocks_are_nested_regions_of_one_graph(stack: Callable[..., nn.Module], until: Wait) -> None:
    model, x = stack().eval(), torch.randn(2, 16)
    compiled = torchspan.compile(model, strategy="nested", backend=takes_nested_graphs, fullgraph=True)
    with torch.no_grad():  # a nested region's backward is code of a compiler: this backend is none
        expected = model(x)
        assert torch.equal(compiled(x), expected)
        until(lambda: bool(compiled.report.attempts), lambda: compiled(x))
        assert difference(compiled(x), expected) is None and torch.equal(model(x), expected)
    (attempt,) = compiled.report.attempts
    assert (attempt.strategy, attempt.region, attempt.outcome, attempt.cause) == ("nested", "Stack", "compiled", None)
    assert compiled.report.decisions[1].reason == "one region, with 3 nested regions"


@pytest.mark.filterwarnings("ignore:invoke_subgraph traced multiple backward graphs:UserWarning")
def test_inductor_trains_through_nested_regions(stack: Callable[..., nn.Module], until: Wait) -> None:
    reference, model, x = stack(), stack(), torch.randn(8, 16)
    compiled = torchspan.compile(model, strategy="nested", budget=Budget(seconds=400))

    def step(run: nn.Module) -> torch.Tensor:
        run.zero_grad()
        loss: torch.Tensor = run(x).square().mean()
        loss.backward()
        return loss.detach()

    until(lambda: "swap_stall_s" in compiled.report.figures, lambda: step(compiled))
    assert difference(step(compiled), step(reference)) is None
    for actual, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert difference(actual.grad, other.grad) is None
    (attempt,) = compiled.report.attempts
    assert (attempt.strategy, attempt.outcome) == ("nested", "compiled")


def test_what_cannot_be_nested_goes_on_with_the_next_strategy_and_leaves_no_trace(
    stack: Callable[..., nn.Module], until: Wait
) -> None:
    model, x = stack().eval(), torch.randn(2, 16)
    compiled = torchspan.compile(model, strategy=["nested", "whole"], backend=takes_flat_graphs)
    with torch.no_grad():
        until(lambda: len(compiled.report.attempts) == 2, lambda: compiled(x))
    assert [(attempt.strategy, attempt.outcome) for attempt in compiled.report.attempts] == [
        ("nested", "failed"),
        ("whole", "compiled"),
    ]
    assert not any("forward" in vars(part) for part in model.parts)


def test_a_torch_without_nested_regions_says_so(stack: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.compiler, "nested_compile_region")
    decisions = torchspan.compile(stack(), strategy=["nested", "per_block"]).report.decisions
    assert [decision.choice for decision in decisions] == ["nested → per_block → eager", "not nested", "per_block"]
    assert f"torch {torch.__version__} has no torch.compiler.nested_compile_region" in decisions[1].reason


def test_a_program_without_blocks_has_nothing_to_nest() -> None:
    for program in (nn.Linear(2, 2), abs):
        choices = [decision.choice for decision in report_of(torchspan.compile(program, strategy="nested")).decisions]
        assert choices == ["nested → eager", "not nested", "eager"]


def test_copies_and_pickles_of_a_nested_model_run_as_before(stack: Callable[..., nn.Module]) -> None:
    model, x = stack().eval(), torch.randn(2, 16)
    expected = model(x)
    torchspan.compile(model, strategy="nested")
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), expected)
    assert copied.parts[0].forward.__self__ is copied.parts[0]
    layers = nn.Sequential(*(nn.TransformerEncoderLayer(4, 2, 8) for _ in range(2))).eval()
    y = torch.randn(3, 1, 4)
    expected = layers(y)
    torchspan.compile(layers, strategy="nested")
    assert torch.equal(pickle.loads(pickle.dumps(layers))(y), expected)
    assert list(model.state_dict()) == list(stack().state_dict())
