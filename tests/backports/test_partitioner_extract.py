"""Part of a joint graph is extracted whatever its nodes are marked with, if that is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import fx

pytestmark = pytest.mark.usefixtures("environment")


def joint() -> tuple[fx.Graph, fx.Node, fx.Node, fx.Node]:
    graph = fx.Graph()
    x = graph.placeholder("x")
    middle = graph.call_function(torch.ops.aten.sin.default, (x,))
    end = graph.call_function(torch.ops.aten.cos.default, (middle,))
    middle.meta["partitioner_tag"] = "must_be_in_backward"
    graph.output((end,))
    return graph, x, middle, end


def extract(*args: object, **options: object) -> fx.Graph:
    from torch._functorch.partitioners import _extract_graph_with_inputs_outputs

    return _extract_graph_with_inputs_outputs(*args, **options)  # type: ignore[arg-type]


def targets(graph: fx.Graph) -> list[object]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


def test_marks_count_unless_they_are_ignored() -> None:
    graph, x, _, end = joint()
    with pytest.raises(AssertionError, match="was invalid, but is output"):
        extract(graph, [x], [end], [None])
    result = extract(graph, [x], [end], [None], ignore_must_be_in_fw_bw=True)
    assert targets(result) == [torch.ops.aten.sin.default, torch.ops.aten.cos.default]
    assert targets(extract(graph, [x], [end], [None], "backward")) == targets(result)


def test_a_marked_node_can_be_an_input_and_outputs_say_what_they_are() -> None:
    graph, _, middle, end = joint()
    result = extract(graph, [middle], [end], ["the end"])
    assert targets(result) == [torch.ops.aten.cos.default]
    (output,) = result.find_nodes(op="output")
    assert output.meta["desc"] == ["the end"]
