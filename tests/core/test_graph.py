"""A Graph verifies its signature, its order, and that no collective is read before a wait."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule

from torchspan.core.errors import GraphError
from torchspan.core.graph import Graph, InputSpec, OutputSpec, output_node


def graph(num_outputs: int = 2) -> Graph:
    fx = FxGraph()
    x, w = fx.placeholder("x"), fx.placeholder("w")
    product = fx.call_function(torch.ops.aten.mul.Tensor, (x, w))
    loss = fx.call_function(torch.ops.aten.sum.default, (product,))
    fx.output((loss, x))
    outputs = (OutputSpec("loss", "loss"), OutputSpec("gradient", "w"))[:num_outputs]
    return Graph(GraphModule(torch.nn.Module(), fx), (InputSpec("input", "x"), InputSpec("parameter", "w")), outputs)


def test_nodes_are_found_by_what_they_stand_for() -> None:
    example = graph()
    example.verify()
    assert [node.name for node in example.placeholders()] == ["x", "w"]
    assert {node.name: name for node, name in example.gradients().items()} == {"x": "w"}
    assert example.count_targets() == {"aten.mul.Tensor": 1, "aten.sum.default": 1}
    assert example.with_module(example.module, "a pass").notes == ("a pass",)


def test_a_signature_that_does_not_fit_is_refused_with_both_counts() -> None:
    with pytest.raises(GraphError, match="the graph has 2 outputs, its signature has 1"):
        graph(num_outputs=1).verify()


def test_a_node_that_is_used_before_it_is_made_is_refused() -> None:
    example = graph()
    mul, total = (node for node in example.module.graph.nodes if node.op == "call_function")
    total.append(mul)
    with pytest.raises(GraphError, match="the graph is not well formed"):
        example.verify()


def test_a_collective_that_is_read_without_a_wait_is_refused_by_both_names() -> None:
    fx = FxGraph()
    x = fx.placeholder("x")
    gathered = fx.call_function(torch.ops._c10d_functional.all_gather_into_tensor.default, (x, 2, "0"))
    fx.output((fx.call_function(torch.ops.aten.neg.default, (gathered,)),))
    unwaited = Graph(GraphModule(torch.nn.Module(), fx), (InputSpec("input", "x"),), (OutputSpec("output", "y"),))
    with pytest.raises(GraphError, match=r"neg\S* reads the collective all_gather_into_tensor\S* .* before any wait_tensor"):
        unwaited.verify()
    wait = fx.call_function(torch.ops._c10d_functional.wait_tensor.default, (gathered,))
    output_node(fx).prepend(wait)
    for user in list(gathered.users):
        if user is not wait:
            user.replace_input_with(gathered, wait)
            user.prepend(wait)
    unwaited.verify()
    assert unwaited.num_collectives() == {"all_gather_into_tensor": 1}
