"""What is checked of every pass, beside the graph that it was given; each check names the node, what was found and expected."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from torchspan.core.errors import GraphError
from torchspan.core.graph import Graph, is_async_collective
from torchspan.passes._memory import check_aliases, check_writes
from torchspan.passes._metadata import check_metadata
from torchspan.passes._values import shown_node
from torchspan.private import fx


def check_change(before: Graph, after: Graph) -> None:
    """Raise GraphError unless `after`, which is well formed, is also valid where `before` was.

    Checked are waits, symbols, metadata, what shares memory, and what writes in place. The cost grows with what the pass
    changed: see each check.
    """
    check_waits(before, after)
    check_symbols(after)
    check_metadata(before, after)
    check_aliases(before, after)
    check_writes(before, after)


def check_waits(before: Graph, after: Graph) -> None:
    """Raise GraphError unless each result of each collective is waited for once, and read by nothing else.

    A collective that was waited for otherwise in `before` may stay so.
    """
    old = {node.name: num for node, num in _num_waits(before)}
    for node, num in _num_waits(after):
        if num != 1 and old.get(node.name) != num:
            problem = "is never waited for" if not num else f"is waited for {num} times"
            raise GraphError(f"the result of the collective {shown_node(node)} {problem}; expected one wait_tensor")


def _num_waits(graph: Graph) -> Iterator[tuple[Node, int]]:
    """Each result of a collective, and how often it is waited for; GraphError where something else reads it."""
    for node in graph.module.graph.nodes:
        if is_async_collective(node):
            is_several = isinstance(node.meta.get("val"), (tuple, list))
            for result in list(node.users) if is_several else [node]:
                waits = [user for user in result.users if str(user.target).startswith("_c10d_functional.wait_tensor")]
                others = [user for user in result.users if user not in waits and not str(user.target).startswith("aten.sym_")]
                if others:
                    raise GraphError(f"{shown_node(others[0])} reads the collective {shown_node(node)} before any wait_tensor")
                yield result, len(waits)


def check_symbols(graph: Graph) -> None:
    """Raise GraphError where a size that depends on data is used before the node that finds it out.

    Only an operator whose result depends on data may bring in a symbol; any other has those of what came before it.
    """
    defined: set[Any] = set()
    for node in graph.module.graph.nodes:
        new = _symbols(node.meta.get("val")) - defined
        if new and not _finds_out_sizes(node):
            names = ", ".join(sorted(map(str, new)))
            raise GraphError(
                f"{shown_node(node)} has the size {names}, which depends on data, and nothing before it finds it out; expected "
                "the node that does (an item, a nonzero) earlier in the graph"
            )
        defined |= new


def _symbols(value: Any) -> set[Any]:
    """The symbols in a value whose numbers are known at run time only."""
    if isinstance(value, torch.Tensor):
        sizes: list[Any] = [size for size in value.shape if type(size) is not int]
    elif isinstance(value, (tuple, list)):
        return {symbol for item in value for symbol in _symbols(item)}
    else:
        sizes = [value] if isinstance(value, torch.SymInt) else []
    if not sizes:
        return set()

    return set(fx.free_unbacked_symbols(sizes))


def _finds_out_sizes(node: Node) -> bool:
    if "unbacked_bindings" in node.meta or node.op in ("placeholder", "call_module", "get_attr"):
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        tags = node.target.tags
        return torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags
    return isinstance(node.target, torch._ops.HigherOrderOperator)
