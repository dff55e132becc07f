"""Bisect: a pass that is wrong on purpose is named, with the first node that differs; a pipeline that is right says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from torchspan.capture.train_step import capture_train_step
from torchspan.core.errors import PassError
from torchspan.core.graph import Graph
from torchspan.core.program import Program
from torchspan.models.llama3 import FLAVOURS, Llama3
from torchspan.passes._base import Pass, PassContext, editable
from torchspan.passes._bisect import Finding, Stages, bisect
from torchspan.passes._pipeline import Pipeline

aten = torch.ops.aten


@pytest.fixture(scope="module")
def program() -> Program:
    """The step of a tiny Llama 3 in one process."""
    tokens, labels = torch.randint(256, (2, 2, 8), generator=torch.Generator().manual_seed(1))
    return Program(Loss(Llama3(FLAVOURS["tiny"]).init_weights(0)), (tokens, labels))


@pytest.fixture(scope="module")
def graph(program: Program) -> Graph:
    """Its training step; no pass changes it."""
    return capture_train_step(program)


class Loss(torch.nn.Module):
    """Cross-entropy of a model's logits."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.model(tokens).flatten(0, 1), labels.flatten())


@dataclass(frozen=True)
class Keeps(Pass):
    """Writes each silu as x times sigmoid of x: the numbers stay near, and more nodes make them."""

    name: ClassVar[str] = "keeps"
    tolerance: ClassVar[float] = 1e-5

    def run(self, graph: Graph, context: PassContext) -> Graph:
        module = editable(graph)
        for node in list(module.graph.nodes):
            if node.target is aten.silu.default:
                with module.graph.inserting_before(node):
                    gate = alike(node, aten.sigmoid.default, node.args[0])
                    product = alike(node, aten.mul.Tensor, node.args[0], gate)
                node.replace_all_uses_with(product)
                module.graph.erase_node(node)
        module.recompile()
        return graph.with_module(module, "keeps")


@dataclass(frozen=True)
class Copies(Pass):
    """Copies the graph."""

    name: ClassVar[str] = "copies"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        return graph.with_module(editable(graph), "copies")


@dataclass(frozen=True)
class Wrong(Pass):
    """Claims that it changes no bit."""

    name: ClassVar[str] = "wrong"
    change: Callable[[GraphModule], None] = lambda module: None

    def __str__(self) -> str:
        return self.name

    def run(self, graph: Graph, context: PassContext) -> Graph:
        module = editable(graph)
        self.change(module)
        module.recompile()
        return graph.with_module(module, "wrong")


def alike(node: Node, target: Any, *args: Any) -> Node:
    """A new call whose value is like that of `node`."""
    new = node.graph.call_function(target, args)
    new.meta = dict(node.meta)
    return new


def find(graph: Graph, program: Program, wrong: Callable[[GraphModule], None], *others: Any, gather: Any = None) -> Any:
    """What bisect says of a pipeline of three, the middle one of which does `wrong`."""
    stages = Stages()
    Pipeline((Keeps(), Wrong(wrong), Copies())).run(graph, instruments=[stages])
    arguments = [*program.state().values(), *program.args]
    return bisect(stages.stages, arguments, **({"gather": gather} if gather else {}))


def calls(module: GraphModule, target: Any) -> list[Node]:
    return [node for node in module.graph.nodes if node.target is target]


def test_a_pipeline_that_keeps_its_claims_says_so(graph: Graph, program: Program) -> None:
    assert find(graph, program, lambda module: None) is None


def test_the_pass_and_the_node_are_named_where_an_argument_is_changed(graph: Graph, program: Program) -> None:
    def scaled(module: GraphModule) -> None:
        node = calls(module, aten.mul.Scalar)[1]
        node.args = (node.args[0], 1.01 * node.args[1])

    (expected,) = [calls(graph.module, aten.mul.Scalar)[1].name]
    actual = find(graph, program, scaled)
    assert isinstance(actual, Finding) and actual.pass_.name == "wrong" and actual.node == expected
    lines = actual.text.splitlines()
    assert lines[0] == "bisect: numbers differ first after pass 2 of 3, wrong, which claims bitwise"
    assert f"first node: {expected} (aten.mul.Scalar) of model." in lines[1]  # which one is the second differs by torch
    assert "all that it reads is equal" in lines[1] and "of 22 outputs differ, the first, " in lines[2]


def test_a_node_that_reads_another_value_is_named_with_both(graph: Graph, program: Program) -> None:
    def rewired(module: GraphModule) -> None:
        first, second = calls(module, aten.sigmoid.default)[:2]
        (reader,) = [user for user in second.users if user.target is aten.mul.Tensor and second.args[0] in user.args][:1]
        reader.replace_input_with(second, first)

    result = find(graph, program, rewired)
    assert (
        result.pass_.name == "wrong"
        and "it reads sigmoid_default where the graph before reads sigmoid_default_1" in result.text
    )


def test_what_a_pass_wrote_in_place_of_a_node_is_named_with_what_it_stands_for(graph: Graph, program: Program) -> None:
    def replaced(module: GraphModule) -> None:
        node = calls(module, aten.sigmoid.default)[0]
        with module.graph.inserting_after(node):
            new = alike(node, aten.neg.default, node.args[0])
        with module.graph.inserting_after(new):
            last = alike(node, aten.tanh.default, new)
        node.replace_all_uses_with(last)
        module.graph.erase_node(node)

    result = find(graph, program, replaced)
    assert (
        result.node == "tanh_default"
        and "it stands for sigmoid_default (aten.sigmoid.default); 2 nodes that the pass wrote" in result.text
    )


def test_a_claim_with_a_tolerance_is_held_to_it(graph: Graph, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keeps, "tolerance", 1e-12)
    result = find(graph, program, lambda module: None)
    assert result.pass_.name == "keeps" and "pass 1 of 3, keeps, which claims within 1e-12" in result.text
    assert "it stands for silu" in result.text


def test_a_step_that_gives_other_numbers_each_time_is_told(graph: Graph, program: Program) -> None:
    state = {"calls": 0.0}

    class Counter(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state["calls"] += 1
            return x + state["calls"]

    module = editable(graph)
    module.add_submodule("counter", Counter())
    loss = graph.with_module(module, "x").output_values()[0]
    with module.graph.inserting_after(loss):
        counted = module.graph.call_module("counter", (loss,))
    counted.meta = dict(loss.meta)
    loss.replace_all_uses_with(counted, lambda user: user is not counted)
    module.recompile()
    with pytest.raises(PassError, match="run twice on the same batch, gives other numbers each time"):
        find(graph.with_module(module, "x"), program, lambda module: None)


def test_ranks_agree_on_the_node_that_comes_first_on_any(graph: Graph, program: Program) -> None:
    def gather(mine: Any) -> list[Any]:
        """Of two ranks, the other of which sees a node that comes earlier."""
        return [mine, ((0, "earlier", "earlier: all that it reads is equal"), None)] if isinstance(mine, tuple) else [mine]

    def scaled(module: GraphModule) -> None:
        node = calls(module, aten.mul.Scalar)[1]
        node.args = (node.args[0], 1.01 * node.args[1])

    result = find(graph, program, scaled, gather=gather)
    assert result.node == "earlier" and "on ranks [0]: " in result.text
