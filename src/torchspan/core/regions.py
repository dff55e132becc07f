"""Regions: the annotated parts of a graph, each cut out as a submodule that can be compiled as one unit.

A region is convex (no value leaves it and comes back through a node outside), holds nodes of one annotation only, and stays on
one side of every in-place change. torch's own `CapabilityBasedPartitioner` is not used: it knows one kind of part, and asked
once for each it proposes parts that wait for each other (137 of 300 random graphs of two kinds could not be fused, on torch
2.8.0, 2.13.0 and 2.15.0 alike); it knows nothing of in-place changes either.
"""

from __future__ import annotations

import heapq
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from torchspan.core.errors import GraphError

_META = "torchspan_region"


@dataclass(frozen=True)
class Region:
    """One region of a graph that `cut_regions` cut.

    `name` comes from the `annotation`, `target` is the submodule's attribute in the graph's module, `call` the node that calls
    it. The submodule takes `call.args` and returns a tuple.
    """

    name: str
    annotation: Any
    target: str
    call: Node

    @property
    def module(self) -> GraphModule:
        """The region's own graph."""
        module = _attribute(self.call.graph.owning_module, self.target)
        assert isinstance(module, GraphModule), f"{self.target} is a {type(module).__name__}, not a GraphModule"
        return module

    def example_inputs(self) -> list[Any]:
        """What the region is called with, as its graph's metadata has it: (fake) tensors, SymInts, numbers.

        Raises:
            GraphError: an input has no ``meta["val"]``.
        """
        return [_example(node) for node in self.call.args if isinstance(node, Node)]


def cut_regions(gm: GraphModule, key: str = "compile_with_inductor") -> GraphModule:
    """A graph that computes what `gm` does, with one submodule for each region annotated with `key`.

    Nodes whose ``meta["custom"]`` has `key` go into regions; two whose values under `key` differ never share one. All other
    nodes keep their order, as far as they do not wait for a region. `gm` is not changed; its parameters and buffers are shared.

    >>> from torch.fx import symbolic_trace
    >>> gm = symbolic_trace(lambda x: (x + 1).relu() * 2)
    >>> for node in gm.graph.nodes:
    ...     if node.name == "relu":
    ...         node.meta["custom"] = {"compile_with_inductor": "act"}
    >>> cut = cut_regions(gm)
    >>> [(region.name, region.target) for region in list_regions(cut)]
    [('act', 'region_0_act')]
    >>> cut(torch.tensor([1.0, -3.0]))
    tensor([4., 0.])
    """
    annotations = _annotations(gm, key)
    builder = _Builder(gm)
    for unit in _ordered(gm, _plan(gm, {node: repr(annotation) for node, annotation in annotations.items()})):
        if unit[0] in annotations:
            builder.add_region(unit, annotations[unit[0]], key)
        else:
            builder.copy(unit[0])
    return builder.finish()


def list_regions(gm: GraphModule) -> list[Region]:
    """The regions of a graph that `cut_regions` cut, in the order in which they run."""
    regions = []
    for node in gm.graph.nodes:
        module = _attribute(gm, node.target) if node.op == "call_module" else None
        if isinstance(module, GraphModule) and _META in module.meta:
            name, annotation = module.meta[_META]
            regions.append(Region(name, annotation, node.target, node))
    return regions


def replace_region(gm: GraphModule, region: Region, function: Callable[..., Sequence[Any]]) -> None:
    """Make `gm` call `function` for `region`; it takes the region's inputs and returns a tuple or list of its outputs."""
    path, _, last = region.target.rpartition(".")
    setattr(gm.get_submodule(path), last, _Call(function))


class _Call(torch.nn.Module):
    """A function as a submodule."""

    def __init__(self, function: Callable[..., Sequence[Any]]) -> None:
        super().__init__()
        self.forward = function


# which nodes belong together


def _annotations(gm: GraphModule, key: str) -> dict[Node, Any]:
    """The nodes that go into regions, with their annotations."""
    annotations: dict[Node, Any] = {}
    for node in gm.graph.nodes:
        if _unpacks(node):
            if node.args[0] in annotations:  # a value of several outputs never crosses a region's border whole
                annotations[node] = annotations[node.args[0]]
        elif key in (node.meta.get("custom") or {}) and node.op.startswith("call_") and not _mutates(node):
            annotations[node] = node.meta["custom"][key]
    return annotations


def _name(annotation: Any, key: str) -> str:
    if isinstance(annotation, dict):
        annotation = annotation.get("inductor_region")
    return annotation if isinstance(annotation, str) else key


def _unpacks(node: Node) -> bool:
    """Whether the node takes one of the outputs of a node that has several."""
    if node.op != "call_function" or node.target is not operator.getitem or not isinstance(node.args[0], Node):
        return False
    meta = node.args[0].meta
    return isinstance(meta.get("val", meta.get("example_value", ())), (tuple, list))


def _mutates(node: Node) -> bool:
    """Whether the node changes one of its inputs in place."""
    if node.op == "call_method":
        return bool(re.search(r"[^_]_$", str(node.target)))
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    return getattr(node.target, "__name__", "") == "triton_kernel_wrapper_mutation"


@dataclass
class _Plan:
    """Every node's `slot` and `segment`, and which `owners` the slots have; a slot with an owner is a region."""

    slots: dict[Node, int] = field(default_factory=dict)
    segments: dict[Node, int] = field(default_factory=dict)
    owners: list[str | None] = field(default_factory=lambda: [None])

    def new_slot(self, owner: str | None) -> int:
        self.owners.append(owner)
        return len(self.owners) - 1

    def open_slot(self, earliest: int) -> int:
        """The first slot from `earliest` on that belongs to no region."""
        index = next((slot for slot in range(earliest, len(self.owners)) if self.owners[slot] is None), None)
        return self.new_slot(None) if index is None else index


def _plan(gm: GraphModule, groups: dict[Node, str]) -> _Plan:
    """Number the nodes by slots so that every edge goes to the same or a later slot, and a slot has one owner.

    That makes each region convex and the regions free of circles: a path that leaves a slot only goes up.
    """
    plan, latest, floor, segment = _Plan(), dict[str, int](), 0, 0
    for node in gm.graph.nodes:
        earliest = max([floor, *(plan.slots[parent] for parent in node.all_input_nodes)])
        group = groups.get(node)
        if _mutates(node):  # a border: what stands before it stays before, what stands after it stays after
            floor = plan.slots[node] = plan.new_slot(None)
            plan.segments[node] = segment + 1
            segment += 2
            continue
        plan.segments[node] = segment
        if group is None:
            plan.slots[node] = 0 if node.op in ("placeholder", "get_attr") else plan.open_slot(earliest)
        elif _unpacks(node):
            plan.slots[node] = plan.slots[node.args[0]]
        else:
            if latest.get(group, -1) < earliest:
                latest[group] = plan.new_slot(group)
            plan.slots[node] = latest[group]
    _sink(gm, groups, plan)
    return plan


def _sink(gm: GraphModule, groups: dict[Node, str], plan: _Plan) -> None:
    """Move a node whose users all sit in one later region of its group there: fewer values cross borders."""
    for node in reversed(gm.graph.nodes):
        places = {(plan.slots[user], plan.segments[user]) for user in node.users}
        if node not in groups or len(places) != 1 or _unpacks(node) or any(_unpacks(user) for user in node.users):
            continue
        ((slot, segment),) = places
        if segment == plan.segments[node] and plan.owners[slot] == groups[node]:
            plan.slots[node] = slot


def _ordered(gm: GraphModule, plan: _Plan) -> Iterator[list[Node]]:
    """Nodes and regions in an order in which they can run: the program's, as far as regions allow."""
    units: dict[Node | int, list[Node]] = {}
    keys: dict[Node, Node | int] = {node: node if plan.owners[slot] is None else slot for node, slot in plan.slots.items()}
    for node, key in keys.items():
        units.setdefault(key, []).append(node)
    ranks = {key: (plan.segments[nodes[0]], index) for index, (key, nodes) in enumerate(units.items())}
    by_rank = {rank: key for key, rank in ranks.items()}
    parents = {key: {keys[p] for node in nodes for p in node.all_input_nodes} - {key} for key, nodes in units.items()}
    children = {key: dict.fromkeys(keys[user] for node in nodes for user in node.users) for key, nodes in units.items()}
    ready = [ranks[key] for key in units if not parents[key]]
    heapq.heapify(ready)
    num_done = 0
    while ready:
        done = by_rank[heapq.heappop(ready)]
        num_done += 1
        yield units[done]
        for child in children[done]:
            if child != done and parents[child]:
                parents[child].discard(done)
                if not parents[child]:
                    heapq.heappush(ready, ranks[child])
    assert num_done == len(units), f"{len(units) - num_done} of {len(units)} parts wait for each other"


# the new graph


class _Builder:
    """Writes the cut graph: copies of nodes, and calls of regions."""

    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._graph = Graph()
        self._new: dict[Node, Node] = {}
        self._attributes: dict[str, Any] = {}
        self._num_regions = 0

    def copy(self, node: Node) -> None:
        """Copy a node that is in no region."""
        self._new[node] = self._graph.node_copy(node, self._new.__getitem__)
        if node.op in ("get_attr", "call_module"):
            self._attributes[str(node.target)] = _attribute(self._gm, str(node.target))

    def add_region(self, nodes: list[Node], annotation: Any, key: str) -> None:
        """Put `nodes` into a submodule and call it."""
        inside, name = set(nodes), _name(annotation, key)
        outputs = [node for node in nodes if any(user not in inside for user in node.users)]
        if not outputs:  # nothing that a backend would keep: checks, such as assertions, stay as they are
            for node in nodes:
                self.copy(node)
            return
        inputs, module = self._submodule(nodes, outputs, name)
        module.meta[_META] = (name, annotation)
        target = f"region_{self._num_regions}_{re.sub(r'[^0-9a-zA-Z_]', '_', name)}"
        while hasattr(self._gm, target):
            target += "_"
        self._num_regions += 1
        self._attributes[target] = module
        call = self._graph.call_module(target, tuple(self._new[node] for node in inputs))
        call.meta["val"] = tuple(node.meta.get("val") for node in outputs)
        call.meta["custom"] = {key: annotation}
        for index, node in enumerate(outputs):
            self._new[node] = self._graph.call_function(operator.getitem, (call, index))
            self._new[node].meta = dict(node.meta)

    def _submodule(self, nodes: list[Node], outputs: list[Node], name: str) -> tuple[list[Node], GraphModule]:
        graph = Graph()
        inside: dict[Node, Node] = {}
        attributes: dict[str, Any] = {}
        outside = dict.fromkeys(parent for node in nodes for parent in node.all_input_nodes if parent not in set(nodes))
        inputs = [node for node in outside if not self._is_submodule(node)]
        for node in inputs:
            inside[node] = graph.placeholder(node.name)
            inside[node].meta = {**node.meta, "val": _example(node)} if node.op == "get_attr" else dict(node.meta)
        for node in [*(node for node in outside if self._is_submodule(node)), *nodes]:
            inside[node] = graph.node_copy(node, inside.__getitem__)
            if node.op in ("get_attr", "call_module"):
                attributes[str(node.target)] = _attribute(self._gm, str(node.target))
        graph.output(tuple(inside[node] for node in outputs))
        return inputs, GraphModule(attributes, graph, class_name=re.sub(r"\W", "_", f"Region_{name}"))

    def _is_submodule(self, node: Node) -> bool:
        """Whether the node is a graph that a higher-order operator calls: a constant of the region, never an input."""
        return node.op == "get_attr" and isinstance(_attribute(self._gm, str(node.target)), torch.nn.Module)

    def finish(self) -> GraphModule:
        """The module of the graph that was written."""
        for node in reversed(self._graph.nodes):
            if node.op == "get_attr" and not node.users:
                self._graph.erase_node(node)
        self._graph.set_codegen(self._gm.graph._codegen)
        self._graph.lint()
        module = GraphModule(self._attributes, self._graph, class_name=type(self._gm).__name__)
        module.meta = dict(self._gm.meta)
        module.training = self._gm.training
        return module


def _attribute(module: Any, target: str) -> Any:
    return reduce(getattr, target.split("."), module)


def _example(node: Node) -> Any:
    if "val" in node.meta:
        return node.meta["val"]
    if node.op == "get_attr":
        return _attribute(node.graph.owning_module, str(node.target))
    raise GraphError(
        f"{node.name} ({node.op} {node.target}) goes into a region and has no meta['val']; trace the graph with fake or real "
        "tensors (make_fx, AOTAutograd), so that every node carries its value's shape"
    )
