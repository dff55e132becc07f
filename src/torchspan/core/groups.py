"""Process groups in an FX graph: which a graph calls by name, and the same graph with other names for them.

torch counts groups as they are made, so that the group of one mesh axis has another name on another rank. Code that is to run
on all ranks calls its groups by names that are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

_ARGUMENTS = ("group_name", "group")


def list_groups(module: GraphModule) -> list[str]:
    """The names of the process groups that a graph's collectives take, each once, in the order of their first use.

    >>> graph = Graph()
    >>> x = graph.placeholder("x")
    >>> y = graph.call_function(torch.ops._c10d_functional.all_reduce.default, (x, "sum", "3"))
    >>> _ = graph.output(graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (y,)))
    >>> list_groups(GraphModule({}, graph))
    ['3']
    """
    names: dict[str, None] = {}
    for node in module.graph.nodes:
        _with_groups(node, lambda name: names.setdefault(name) or name)
    return list(names)


def rename_groups(module: GraphModule, names: Mapping[str, str]) -> GraphModule:
    """A copy of the graph in which each group has the name that `names` gives it; what is not in `names` keeps its own.

    Attributes and submodules are shared.
    """
    copy, nodes = Graph(), dict[Node, Node]()
    copy.output(copy.graph_copy(module.graph, nodes))
    copy.set_codegen(module.graph._codegen)
    for node in copy.nodes:
        node.args, node.kwargs = _with_groups(node, lambda name: names.get(name, name))
    renamed = GraphModule(module, copy, class_name=type(module).__name__)
    renamed.meta = dict(module.meta)
    return renamed


def _with_groups(node: Node, rename: Callable[[str], str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a node, with each name of a group as `rename` has it."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.args, node.kwargs
    arguments = [argument.name for argument in node.target._schema.arguments]
    args = tuple(_renamed(name, value, rename) for name, value in zip(arguments, node.args))
    return args, {name: _renamed(name, value, rename) for name, value in node.kwargs.items()}


def _renamed(argument: str, value: Any, rename: Callable[[str], str]) -> Any:
    return rename(value) if argument in _ARGUMENTS and isinstance(value, str) else value
