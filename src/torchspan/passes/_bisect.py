"""Bisect: the first pass of a pipeline after which numbers differ, and the first node whose value does.

Each graph is run on the same arguments. What a pass gave is compared with what it was given, by the pass's own claim: the
same bits, or within its tolerance of the largest value. The node is found from the outputs that differ, backwards through both
graphs at once: a node that differs though all that it reads is equal is a cause. Nodes are the same by name, which passes keep.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from torchspan.core.errors import PassError
from torchspan.core.graph import Graph, is_async_collective, output_node
from torchspan.passes._base import Pass
from torchspan.passes._instruments import Instrument
from torchspan.passes._values import shown_node

Gather = Callable[[Any], list[Any]]
"""Gives what each rank of a job passes to it, on every rank."""


@dataclass(frozen=True)
class Stage:
    """One pass that ran, with the graphs before and after it."""

    pass_: Pass
    before: Graph
    after: Graph


class Stages(Instrument):
    """Keeps each pass with both of its graphs."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []

    def after(self, pass_: Pass, before: Graph, after: Graph) -> None:
        """Keep them."""
        self.stages.append(Stage(pass_, before, after))


@dataclass(frozen=True)
class Finding:
    """The first pass after which numbers differ, the `node` of its graph that differs first, and both as text."""

    pass_: Pass
    node: str
    text: str


def bisect(stages: Sequence[Stage], arguments: Sequence[Any], gather: Gather = lambda value: [value]) -> Finding | None:
    """The first pass whose graph gives other numbers than its claim allows, or None if there is none.

    Every rank of a job calls this with its own arguments, and gets the same answer.

    Raises:
        PassError: a graph that cannot be run, or one that gives other numbers each time: nothing can be compared with it.
    """
    if not stages:
        return None
    expected = _run(stages[0].before, arguments, "as captured")
    again = _run(stages[0].before, arguments, "as captured")
    if any(gather(any(_differs(value, other, 0.0) for value, other in zip(expected, again)))):
        raise PassError(
            "the captured graph, run twice on the same batch, gives other numbers each time: nothing can be compared with it; "
            "expected deterministic operators (torch.use_deterministic_algorithms)"
        )
    for number, stage in enumerate(stages, 1):
        results = _run(stage.after, arguments, f"after {stage.pass_}")
        wrong = [i for i, (value, other) in enumerate(zip(expected, results)) if _differs(value, other, stage.pass_.tolerance)]
        if any(gather(bool(wrong))):
            cause = _first_cause(stage, arguments)
            outputs = _told_outputs(stage.after, expected, results, wrong)
            reports = gather((cause and (cause.place, cause.node.name, cause.text), outputs))
            return _finding(stage, f"{number} of {len(stages)}", reports)
        expected = results
    return None


def _run(graph: Graph, arguments: Sequence[Any], when: str) -> list[Any]:
    """The outputs of a graph on copies of `arguments`, with the same random numbers each time."""
    return _repeatable(graph.module, arguments, when)


def _repeatable(run: Callable[..., Any], arguments: Sequence[Any], when: str) -> list[Any]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            results = run(*(argument.clone() if isinstance(argument, Tensor) else argument for argument in arguments))
        except (RuntimeError, TypeError, ValueError, IndexError) as cause:
            raise PassError(f"the graph {when} cannot be run on the first batch: {cause}") from cause
    return list(results) if isinstance(results, (tuple, list)) else [results]


# the first node


@dataclass(frozen=True)
class _Cause:
    """A node that differs though all that it reads is equal; its place in the graph."""

    place: int
    node: Node
    text: str


def _first_cause(stage: Stage, arguments: Sequence[Any]) -> _Cause | None:
    """The first node of the graph after a pass whose value differs; None if none does on this rank."""
    tolerance = stage.pass_.tolerance
    before = _Values.of(stage.before.module, arguments, tolerance)
    after = _Values.of(stage.after.module, arguments, tolerance)
    causes = _Search(before, after, tolerance).causes()
    return min(causes, key=lambda cause: cause.place, default=None)


@dataclass
class _Values:
    """The nodes of a graph by name, and the value that each had: its digest, where bits are compared, else itself."""

    module: GraphModule
    nodes: dict[str, Node] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(module: GraphModule, arguments: Sequence[Any], tolerance: float) -> _Values:
        """Those of one run."""
        values = _Values(module, {node.name: node for node in module.graph.nodes})
        _repeatable(_Recorder(module, values.values, tolerance).run, arguments, "node by node")
        return values

    @property
    def results(self) -> list[Any]:
        """What the graph returns, as nodes."""
        results = output_node(self.module.graph).args[0]
        return list(results) if isinstance(results, (tuple, list)) else [results]


class _Recorder(Interpreter):
    """Runs a graph node by node and keeps what each gives; what a collective gives only once it was waited for."""

    def __init__(self, module: GraphModule, values: dict[str, Any], tolerance: float) -> None:
        super().__init__(module)
        self._values, self._tolerance = values, tolerance

    def run_node(self, n: Node) -> Any:
        """Run it, and keep its value."""
        value = super().run_node(n)
        if n.op != "output" and not _is_under_way(n):
            self._values[n.name] = _kept(value, self._tolerance)
        return value


def _is_under_way(node: Node) -> bool:
    """Whether a node's numbers may not be read yet."""
    if is_async_collective(node):
        return True
    return getattr(node.target, "__name__", "") == "getitem" and is_async_collective(node.all_input_nodes[0])


def _kept(value: Any, tolerance: float) -> Any:
    if isinstance(value, (tuple, list)):
        return [_kept(part, tolerance) for part in value]
    if not isinstance(value, Tensor):
        return value
    if tolerance:
        return value.clone()
    plain = value.detach().resolve_conj().resolve_neg().contiguous().flatten().cpu().view(torch.uint8)
    digest = hashlib.blake2b(plain.numpy().data, digest_size=16).hexdigest()
    return f"{tuple(value.shape)} {value.dtype} {digest}"


class _Search:
    """Walks backwards from the outputs that differ."""

    def __init__(self, before: _Values, after: _Values, tolerance: float) -> None:
        self._before, self._after, self._tolerance = before, after, tolerance
        self._place = {node: index for index, node in enumerate(after.module.graph.nodes)}

    def causes(self) -> Iterator[_Cause]:
        """Every node that differs though what it reads is equal."""
        output = output_node(self._after.module.graph)
        waiting, seen = [], set[tuple[Node, Node]]()
        for old, new in zip(self._before.results, self._after.results):
            if self._differ(old, new):
                if self._is_right(new):
                    yield self._cause(output, f"it returns {new.name} where the graph before returns {old.name}")
                else:
                    waiting.append((old, new))
        while waiting:
            old, new = waiting.pop()
            if (old, new) not in seen:
                seen.add((old, new))
                cause, deeper = self._look_at(old, new)
                waiting += deeper
                if cause is not None:
                    yield cause

    def _look_at(self, old: Node, new: Node) -> tuple[_Cause | None, list[tuple[Node, Node]]]:
        """Whether `new`, which stands for `old` and differs from it, is a cause; else the pairs further back that differ."""
        reads, others = _inputs(old), _inputs(new)
        if (old.op, old.target, len(reads)) != (new.op, new.target, len(others)):
            return self._look_at_stretch(old, new)
        deeper = []
        for old_input, new_input in zip(reads, others):
            if self._differ(old_input, new_input):
                if self._is_right(new_input):
                    return self._cause(new, f"it reads {new_input.name} where the graph before reads {old_input.name}"), []
                deeper.append((old_input, new_input))
        text = "all that it reads is equal" if new.name == old.name else f"it stands for {shown_node(old)}, and reads the same"
        return (None, deeper) if deeper else (self._cause(new, text), [])

    def _look_at_stretch(self, old: Node, new: Node) -> tuple[_Cause | None, list[tuple[Node, Node]]]:
        """The same for what the pass wrote in place of `old`: new nodes, back to those that were there before."""
        stretch, deeper, waiting = dict[Node, None](), [], [new]
        while waiting:
            node = waiting.pop()
            known = self._before.nodes.get(node.name)
            if known is not None and node is not new:
                if self._differ(known, node):
                    deeper.append((known, node))
            elif node not in stretch:
                stretch[node] = None
                waiting += _inputs(node)
        text = f"it stands for {shown_node(old)}; {len(stretch)} nodes that the pass wrote compute it from equal values"
        return (None, deeper) if deeper else (self._cause(new, text), [])

    def _cause(self, node: Node, text: str) -> _Cause:
        module = node.meta.get("custom", {}).get("module")
        where = f" of {module}" if module else ""
        return _Cause(self._place[node], node, f"{shown_node(node)}{where}: {text}")

    def _is_right(self, node: Node) -> bool:
        """Whether a node has the value that the node of its name had before."""
        known = self._before.nodes.get(node.name)
        return known is not None and node.name in self._after.values and not self._differ(known, node)

    def _differ(self, old: Any, new: Any) -> bool:
        """Whether two nodes differ; of what is under way, whether what it reads does."""
        if not isinstance(old, Node) or not isinstance(new, Node):
            return bool(old != new)
        if old.name in self._before.values and new.name in self._after.values:
            return _differs(self._before.values[old.name], self._after.values[new.name], self._tolerance)
        return len(_inputs(old)) != len(_inputs(new)) or any(map(self._differ, _inputs(old), _inputs(new)))


def _inputs(node: Node) -> list[Node]:
    """The nodes that a node reads, in the order of its arguments, each as often as it is read."""
    nodes: list[Node] = []
    map_arg((node.args, node.kwargs), nodes.append)
    return nodes


# what differs


def _differs(first: Any, second: Any, tolerance: float) -> bool:
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)):
        return len(first) != len(second) or any(_differs(a, b, tolerance) for a, b in zip(first, second))
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return type(first) is not type(second) or bool(first != second)
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return True
    if not tolerance or not first.is_floating_point():
        return bool(_kept(first, 0.0) != _kept(second, 0.0))
    return not _share(first, second) <= tolerance


def _share(first: Tensor, second: Tensor) -> float:
    """The largest difference of two tensors over the largest value of the first; NaN and infinity are equal to themselves."""
    if not first.numel():
        return 0.0
    wide, others = first.detach().double(), second.detach().double()
    same = (wide == others) | (wide.isnan() & others.isnan())
    gap = torch.where(same, 0.0, (wide - others).abs()).max()
    size = torch.where(wide.isfinite(), wide, 0.0).abs().max()
    return 0.0 if not float(gap) else float(gap / size)


def _told_outputs(graph: Graph, expected: list[Any], results: list[Any], wrong: list[int]) -> str | None:
    """How many outputs differ on this rank, and by how much the first."""
    if not wrong:
        return None
    first = wrong[0]
    spec, expected_value, value = graph.outputs[first], expected[first], results[first]
    share = ""
    if isinstance(expected_value, Tensor) and isinstance(value, Tensor) and expected_value.shape == value.shape:
        share = f" by up to {_share(expected_value, value):.3g} of its largest value"
    return f"{len(wrong)} of {len(expected)} outputs differ, the first, {spec.kind} {spec.name},{share}"


def _finding(stage: Stage, number: str, reports: list[Any]) -> Finding:
    """The finding of all ranks: the node that comes first on any of them."""
    causes = [(*cause, rank) for rank, (cause, _) in enumerate(reports) if cause is not None]
    nothing = (0, "", "none: each node differs by no more than the claim allows, and the differences add up", 0)
    _, node, text, _ = min(causes, default=nothing)
    ranks = [rank for rank, (_, outputs) in enumerate(reports) if outputs]
    outputs = next((outputs for _, outputs in reports if outputs), "")
    where = f"on ranks {ranks}: " if len(reports) > 1 else ""
    return Finding(
        stage.pass_,
        node,
        f"bisect: numbers differ first after pass {number}, {stage.pass_}, which claims {stage.pass_.claim()}\n"
        f"  first node: {text}\n"
        f"  {where}{outputs}",
    )
