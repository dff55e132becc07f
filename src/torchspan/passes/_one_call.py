"""A graph of one call: the step runs as compiled code, not as the graph's operators."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node

from torchspan.core.graph import COLLECTIVES_INSIDE, Graph, output_node


def one_call(graph: Graph, target: str, function: Callable[..., Any]) -> GraphModule:
    """A module with the graph's inputs and outputs that calls `function`, its submodule `target`, for what is between them.

    `function` takes all inputs and gives a list or tuple of all outputs.
    """
    new = FxGraph()
    inputs: list[Node] = []
    for node in graph.placeholders():
        inputs.append(new.placeholder(node.name))
        inputs[-1].meta = dict(node.meta)
    call = new.call_module(target, tuple(inputs))
    values = graph.output_values()
    call.meta = {
        "val": tuple(value.meta.get("val") if isinstance(value, Node) else value for value in values),
        COLLECTIVES_INSIDE: graph.num_collectives(),
    }
    results: list[Node] = []
    for index, value in enumerate(values):
        results.append(new.call_function(operator.getitem, (call, index)))
        results[-1].meta = dict(value.meta) if isinstance(value, Node) else {}
    output = new.output(tuple(results))
    output.meta = dict(output_node(graph.module.graph).meta)
    module = GraphModule({target: _Call(function)}, new, class_name=type(graph.module).__name__)
    module.meta = dict(graph.module.meta)
    return module


class _Call(nn.Module):
    """A function as a submodule; a bound call of a module, which would else become a submodule of this one."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = function.__call__ if isinstance(function, nn.Module) else function
