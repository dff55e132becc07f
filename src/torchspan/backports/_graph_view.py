"""The nodes of a graph by the modules that they were traced in, as a tree: what manual overlap of collectives is planned on."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import Graph, Node
from torch.utils._ordered_set import OrderedSet

from torchspan.backports._overlap import module_stack

ModuleStack = Callable[[Node], Sequence[tuple[str, type]]]


class GraphView:
    """A module: its nodes in order (`data`), and the modules in it (`children`), which are its items and attributes too.

    Args:
        name: of the module in the one that holds it.
        klass: its class.
    """

    def __init__(self, name: str, klass: type[Any]) -> None:
        self.name, self.klass = name, klass
        self.data: list[Node] = []
        self.unique_nodes: OrderedSet[Node] = OrderedSet()
        self.children: dict[str, GraphView] = {}

    def add(self, data: Node) -> None:
        """Add a node, once."""
        if data not in self.unique_nodes:
            self.data.append(data)
            self.unique_nodes.add(data)

    def get_child(self, module_stack: str, klass: type[Any] | None = None) -> GraphView:
        """The module of that name in this one, which is made where there is none."""
        return self.children.setdefault(module_stack, GraphView(module_stack, klass or self.klass))

    def __getitem__(self, name: str) -> GraphView:
        return self.children[name]

    def __getattr__(self, name: str) -> GraphView:
        children = vars(self).get("children", {})
        if name not in children:
            raise AttributeError(f"no module {name!r} in {vars(self).get('name')!r}; it has {list(children)}")
        return children[name]

    def __repr__(self) -> str:
        inner = "".join(f"\n  ({name}): {textwrap.indent(repr(view), '  ').lstrip()}" for name, view in self.children.items())
        return f"{self.klass.__name__}({inner}{chr(10) if inner else ''})"


def make_graph_view(graph: Graph, module_stack_fn: ModuleStack | None = None) -> GraphView | None:
    """The modules of `graph` as a tree; None where no node knows its module.

    Args:
        graph: whose nodes are sorted by module.
        module_stack_fn: gives the path and the class of each module that a node is in, outermost first; by default what
            tracing wrote.
    """
    root: GraphView | None = None
    for node in graph.nodes:
        for path, klass in (module_stack_fn or module_stack)(node):
            names = path.split(".")
            root = view = root or GraphView(names[0], klass)
            for name in names:
                view = view.get_child(name, klass) if path else view
                view.add(node)
    return root


def get_subgraph_by_path(graph_view: GraphView, paths: str | list[str]) -> list[Node]:
    """The nodes of the module at a dotted path, or at several one after the other; none where there is no such module."""
    return [node for path in ([paths] if isinstance(paths, str) else paths) for node in _nodes_at(graph_view, path)]


def _nodes_at(view: GraphView, path: str) -> list[Node]:
    for name in path.split("."):
        if name not in view.children:
            return []
        view = view.children[name]
    return view.data
