"""Again: give the backward a value of the forward anew, computed or brought back, where it is first read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch.fx import Graph as FxGraph
from torch.fx import Node

from torchspan.passes._phases import Phase, mark_backward
from torchspan.passes._storages import producer_of, viewed_by

RECOMPUTED = "recomputed"
"""Under this key of ``custom``, a node says which pass computes again what the forward computed: it is no duplicate."""


class Anew:
    """Rewrites readers in the backward; `graph` is changed in place, `phases` gets the new nodes.

    `recomputed` are nodes that are copied, with the views of what they give, from values that are kept; `bring_back` are owners
    with a function that writes the node which brings each back, at the place where the graph inserts. What several readers
    want is made once, right before the first of them.
    """

    def __init__(
        self,
        graph: FxGraph,
        phases: dict[Node, Phase],
        recomputed: Collection[Node],
        bring_back: dict[Node, Callable[[], Node]],
        name: str,
    ) -> None:
        self._graph, self._phases, self._recomputed, self._bring_back = graph, phases, set(recomputed), bring_back
        self._name = name
        self._place = {node: index for index, node in enumerate(graph.nodes)}
        self._is_gone: dict[Node, bool] = {}
        self._new: dict[Node, Node] = {}
        self.num_recomputed = 0

    def rewrite(self) -> None:
        """Have every node of a later phase read what is made anew."""
        for reader in list(self._graph.nodes):
            if self._phases[reader] != "forward" and reader.op not in ("placeholder", "output"):
                values = [node for node in reader.all_input_nodes if self.is_gone(node)]
                if values:
                    self._make(values, reader)
                    replace_inputs(reader, self._new)

    def is_gone(self, node: Node) -> bool:
        """Whether the value of a forward node is not kept for the backward."""
        is_gone = self._is_gone.get(node)
        if is_gone is None:
            is_gone = self._phases[node] == "forward" and node.op == "call_function" and self._look(node)
            self._is_gone[node] = is_gone
        return is_gone

    def _look(self, node: Node) -> bool:
        if node in self._bring_back or producer_of(node) in self._recomputed:
            return True
        viewed = viewed_by(node)
        return viewed is not None and self.is_gone(viewed)

    def _make(self, values: Iterable[Node], reader: Node) -> None:
        for node in self._missing(values):
            with self._graph.inserting_before(reader):
                if node in self._bring_back:
                    new = self._bring_back[node]()
                else:
                    new = self._graph.node_copy(node, lambda used: self._new.get(used, used))
                    new.meta = {**node.meta, "custom": {**(node.meta.get("custom") or {}), RECOMPUTED: self._name}}
                    self.num_recomputed += viewed_by(node) is None and producer_of(node) is node
            mark_backward(new)
            self._phases[new], self._new[node] = "backward", new

    def _missing(self, values: Iterable[Node]) -> list[Node]:
        """What has to be computed so that `values` are there, in the order of the forward."""
        missing: set[Node] = set()
        stack = [*values]
        while stack:
            node = stack.pop()
            if node in missing or node in self._new or not self.is_gone(node):
                continue
            missing.add(node)
            if node not in self._bring_back:
                stack.extend(node.all_input_nodes)
        return sorted(missing, key=self._place.__getitem__)


def replace_inputs(node: Node, new: dict[Node, Node]) -> None:
    """Have `node` read, for each key of `new` among its inputs, the value."""
    from torch.fx.node import map_arg

    def other(used: Node) -> Any:
        return new.get(used, used)

    node.args = map_arg(node.args, other)
    node.kwargs = map_arg(node.kwargs, other)
