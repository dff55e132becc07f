"""Let tokens travel to and from their experts while others compute: one half of the experts at a time.

Shapes, as suffixes of names: R ranks, X experts of each rank, N rows that this rank sends, M rows that it receives.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.fx import Graph as FxGraph
from torch.fx import Node

from torchspan.core.collectives import reorder, wait_for
from torchspan.core.errors import PassError
from torchspan.core.graph import Graph
from torchspan.passes._base import Pass, PassContext, Stage, editable, refuse_writes
from torchspan.passes._journey_window import Steps, Window
from torchspan.passes._journeys import EXCHANGE, PRODUCT, Journey, find_journeys, is_target, nodes_after, summed
from torchspan.passes._writer import Writer, is_pointwise, replace_whole, tensor_of

_WEIGHT = "torchspan.grouped_rows_mm_weight.default"
_PRODUCT_BYTES, _VECTOR_BYTES = 16, 128
"""On a CPU, rows of which width give the same bits wherever in memory they begin, and however many there are.

A product wants whole registers (seen with MKL). What a CPU computes by a series, as `silu`, is another series in vectors than
one by one, as the last numbers of a tensor are: those that two vectors of AVX-512 do not fill.
"""
_ROUNDED_ONCE = ("mul.Tensor", "mul.Scalar", "add.Tensor", "sub.Tensor", "neg.default", "_to_copy.default", "clone.default")
"""Operators of one element whose result is the nearest number there is, and so the same however it is computed."""


@dataclass(frozen=True)
class OverlapExpertParallel(Pass):
    """Splits each mixture of experts in two, by expert, and moves what needs no expert into the time that rows travel.

    Rows come sorted by expert, so each half is a mixture of its own, with the same matrix products: every number stays
    bitwise what it was, weight gradients too. The order is: send both halves; half of what is independent, as the shared
    experts are; compute the first half and send it back; compute the second and send it back; the rest that is independent.
    In the backward, gradients of the experts' weights are computed while gradients of rows travel back. With `split` false, or
    where it cannot be, a mixture stays whole and only the order changes.

    Whether numbers stay bitwise on a CPU depends on the width of rows and on the number of threads. Where they would not, a
    mixture stays whole; with `exact` false it is split nevertheless, and float32 stays within 1e-6 of the largest value.
    """

    name: ClassVar[str] = "overlap_expert_parallel"
    summary: ClassVar[str] = "tokens of one half of the experts travel while the other half, or the shared experts, compute"
    stage: ClassVar[Stage] = "communication"

    split: bool = True
    exact: bool = True

    def require(self, graph: Graph) -> None:
        refuse_writes(self.name, graph)

    def run(self, graph: Graph, context: PassContext) -> Graph:
        module = editable(graph)
        journeys = list(find_journeys(module.graph))
        whole: Counter[str] = Counter()
        places = {node: float(index) for index, node in enumerate(module.graph.nodes)}
        halves = _Halves(module.graph)
        windows = [Window.around(module.graph, journey) for journey in journeys]
        for journey, window in zip(journeys, windows):
            reason = "split is false" if not self.split else _why_whole(journey, self.exact)
            steps = Steps.of_whole(journey) if reason else halves.steps_of(journey)
            if reason:
                whole[reason] += 1
            window.place(steps, halves.erased, places)
        halves.finish(places)
        reorder(module.graph, places)
        module.graph.eliminate_dead_code()
        module.recompile()
        self._record(len(journeys), whole, context)
        return graph.with_module(module, str(self))

    def ensure(self, before: Graph, after: Graph) -> None:
        """Only exchanges of rows were added, at most as many as there were; each still has one wait."""
        old, new = before.num_collectives(), after.num_collectives()
        exchanges = old.pop("all_to_all_rows", 0), new.pop("all_to_all_rows", 0)
        if old != new or not exchanges[0] <= exchanges[1] <= 2 * exchanges[0]:
            raise PassError(
                f"{self.name} made {exchanges[1]} exchanges of {exchanges[0]}, and {dict(new)} of {dict(old)}; "
                "expected twice as many exchanges at most, and the rest as it was"
            )
        for node in after.module.graph.nodes:
            if is_target(node, EXCHANGE) and wait_for(node) is None:
                raise PassError(f"{self.name} left the exchange {node.name} with {len(node.users)} users; expected one wait")

    def _record(self, num_journeys: int, whole: Counter[str], context: PassContext) -> None:
        if not num_journeys:
            reason = "no rows travel to experts and back in this graph: it has no expert parallelism, or another form of it"
            context.report.decide("pass", self.name, "nothing changed", reason)
            return
        num_split = num_journeys - whole.total()
        if num_split:
            choice = f"{num_split} of {num_journeys} journeys of rows, forward and backward, in two halves by expert"
            context.report.decide("pass", self.name, choice, "one half travels while the other, or a shared expert, computes")
        for reason, count in whole.items():
            choice = f"{count} of {num_journeys} journeys of rows whole, beside what is independent"
            context.report.decide("pass", self.name, choice, reason)


def _why_whole(journey: Journey, is_exact: bool) -> str | None:
    """Why the experts of `journey` are not computed in halves, or None."""
    if journey.num_experts < 2:
        return "each rank has one expert; two halves need two"
    if not is_exact or _device(journey.received_RX).type != "cpu":
        return None
    for node in journey.rows:
        value = tensor_of(node)
        assert value is not None
        width = value.shape[1] * value.element_size()
        is_series = is_pointwise(node) and str(node.target).removeprefix("aten.") not in _ROUNDED_ONCE
        needed = _VECTOR_BYTES if is_series else _PRODUCT_BYTES
        if width % needed:
            return (
                f"on a CPU {node.target} of rows of {width} bytes gives other bits in halves; expected a multiple of {needed}, "
                "or exact=false"
            )
        if is_series and torch.get_num_threads() > 1:
            return (
                f"on a CPU {node.target} gives other bits in halves with {torch.get_num_threads()} threads; expected 1 thread, "
                "or exact=false"
            )
    return None


def _device(node: Node) -> torch.device:
    value = tensor_of(node)
    assert value is not None
    return value.device


@dataclass(frozen=True)
class _Sizes:
    """Of one layer's rows: the order that sorts those to send by half, its inverse, and of each half numbers, as nodes.

    Of each half: `num_sent` and `num_received` rows, as whole numbers, and by rank, `sent_R` and `received_R`; how many rows
    each expert has, `counts_X`; the `order_M` that sorts what is received by expert, and its `inverse_M`.
    """

    order_N: Node
    inverse_N: Node
    num_sent: list[Any]
    num_received: list[Any]
    sent_R: list[Node]
    received_R: list[Node]
    counts_X: list[Node] = field(default_factory=list)
    order_M: list[Node] = field(default_factory=list)
    inverse_M: list[Node] = field(default_factory=list)


_aten = torch.ops.aten


class _Halves:
    """Writes journeys in halves; those of the backward go on with the halves of their forward."""

    def __init__(self, graph: FxGraph) -> None:
        self._graph = graph
        self._parts: dict[Node, list[Node]] = {}
        self._cuts: dict[Node, list[Node]] = {}
        self.erased: set[Node] = set()
        self._sizes: dict[tuple[Node, Node], _Sizes] = {}
        self._replaced: list[Node] = []

    def steps_of(self, journey: Journey) -> Steps:
        """Write what takes the place of `journey`; what it was stays until `finish`, and has no other users but itself."""
        write = Writer(self._graph, journey.arrival_back).like(journey.dispatch)
        source, _, _, _, group = journey.dispatch.args
        sizes = self._sizes_of(journey, write)
        sorted_ND = write.like(journey.dispatch)(_aten.index.Tensor, source, [sizes.order_N])
        halves_ND = self._cut(sorted_ND, sizes.num_sent, write)
        exchange = journey.dispatch.target
        sent = [
            write(exchange, rows, sizes.sent_R[half], sizes.received_R[half], sizes.num_received[half], group)  # type: ignore[arg-type]
            for half, rows in enumerate(halves_ND)
        ]
        steps = Steps(write.taken(), [], [], [])
        back = []
        for half, node in enumerate(sent):
            back.append(self._compute(journey, sizes, half, node, write))
            steps.compute.append(write.taken())
        steps.weights = self._weight_gradients(journey, sizes, write)
        write.like(journey.combine)
        waits = [write(journey.arrival_back.target, node) for node in back]  # type: ignore[arg-type]
        whole = write(_aten.index.Tensor, write(_aten.cat.default, waits), [sizes.inverse_N])
        journey.arrival_back.replace_all_uses_with(whole)
        steps.receive = write.taken()
        for node in (journey.arrival_back, journey.combine, journey.back):
            self._graph.erase_node(node)
            self.erased.add(node)
        self._replaced += [journey.arrival, journey.dispatch]
        return steps

    def _sizes_of(self, journey: Journey, write: Writer) -> _Sizes:
        key = journey.sent_RX, journey.received_RX
        if key not in self._sizes:
            self._sizes[key] = self._write_sizes(journey, write)
        return self._sizes[key]

    def _write_sizes(self, journey: Journey, write: Writer) -> _Sizes:
        sent_RX, received_RX = journey.sent_RX, journey.received_RX
        num_experts, middle = journey.num_experts, journey.num_experts // 2
        num_sent, num_received = journey.combine.args[3], journey.dispatch.args[3]
        # of each row that is sent: whether its expert is in its rank's second half
        ends = write(_aten.cumsum.default, write(_aten.view.default, sent_RX, [-1]), 0)
        place_N = write(_aten.arange.default, num_sent, device=_device(sent_RX), pin_memory=False)
        expert_N = write(_aten.remainder.Scalar, write(_aten.searchsorted.Tensor, ends, place_N, right=True), num_experts)
        order_N = self._argsort(write(_aten.ge.Scalar, expert_N, middle), write)
        sizes = _Sizes(order_N, self._argsort(order_N, write), [], [], [], [])
        for begin, end in ((0, middle), (middle, num_experts)):
            halves = [write(_aten.slice.Tensor, counts, 1, begin, end) for counts in (sent_RX, received_RX)]
            for counts, by_rank in zip(halves, (sizes.sent_R, sizes.received_R)):
                by_rank.append(write(_aten.sum.dim_IntList, counts, [1]))
        for total, by_rank, numbers in (
            (num_sent, sizes.sent_R, sizes.num_sent),
            (num_received, sizes.received_R, sizes.num_received),
        ):
            # both are read: torch before 2.9 takes no difference of two data-dependent sizes for a size
            numbers += [write.number(write(_aten.sum.default, counts), 0, total) for counts in by_rank]
        return sizes

    def _compute(self, journey: Journey, sizes: _Sizes, half: int, sent: Node, write: Writer) -> Node:
        """Write the half's part of `journey`, from its wait to its way back, which is the result."""
        rows = write.like(journey.dispatch)(journey.arrival.target, sent)  # type: ignore[arg-type]
        if len(sizes.order_M) == half:
            self._write_order(journey, sizes, half, write)
        for node in journey.rows:
            parts = self._parts.setdefault(node, [])
            if node is journey.first:
                parts.append(write.like(node)(_aten.index.Tensor, rows, [sizes.order_M[half]]))
            else:
                parts.append(self._part(node, journey, sizes, half, write))
        back = write.like(journey.back)(_aten.index.Tensor, self._parts[journey.last][half], [sizes.inverse_M[half]])
        combine = journey.combine
        arguments = (sizes.received_R[half], sizes.sent_R[half], sizes.num_sent[half], combine.args[4])
        return write.like(combine)(combine.target, back, *arguments)  # type: ignore[arg-type]

    def _write_order(self, journey: Journey, sizes: _Sizes, half: int, write: Writer) -> None:
        num_experts, middle = journey.num_experts, journey.num_experts // 2
        begin, end = ((0, middle), (middle, num_experts))[half]
        counts_RX = write(_aten.slice.Tensor, journey.received_RX, 1, begin, end)
        ends = write(_aten.cumsum.default, write(_aten.reshape.default, counts_RX, [-1]), 0)
        place_M = write(_aten.arange.default, sizes.num_received[half], device=_device(counts_RX), pin_memory=False)
        group_M = write(_aten.searchsorted.Tensor, ends, place_M, right=True)
        sizes.order_M.append(self._argsort(write(_aten.remainder.Scalar, group_M, end - begin), write))
        sizes.inverse_M.append(self._argsort(sizes.order_M[half], write))
        sizes.counts_X.append(write(_aten.sum.dim_IntList, counts_RX, [0]))

    def _argsort(self, node: Node, write: Writer) -> Node:
        return write(operator.getitem, write(_aten.sort.stable, node, stable=True), 1)

    def _part(self, node: Node, journey: Journey, sizes: _Sizes, half: int, write: Writer) -> Node:
        """Write the half's part of the node `node`, whose arguments have parts."""
        middle, num_experts = journey.num_experts // 2, journey.num_experts
        replaced: dict[Node, Any] = {}
        for argument in node.all_input_nodes:
            if is_target(node, PRODUCT) and argument is node.args[1]:
                begin, end = ((0, middle), (middle, num_experts))[half]
                replaced[argument] = write.like(node)(_aten.slice.Tensor, argument, 0, begin, end)
            elif (is_target(node, PRODUCT) or is_target(node, _WEIGHT)) and argument is node.args[2]:
                replaced[argument] = sizes.counts_X[half]
            elif argument in self._parts:
                replaced[argument] = self._parts[argument][half]
            else:
                if argument not in self._cuts:
                    self._cuts[argument] = self._cut(argument, sizes.num_received, write.like(argument))
                replaced[argument] = self._cuts[argument][half]
        return write.again(node, replaced)

    def _cut(self, node: Node, sizes: Sequence[Any], write: Writer) -> list[Node]:
        parts = write(_aten.split_with_sizes.default, node, list(sizes))
        return [write(operator.getitem, parts, half) for half in (0, 1)]

    def _weight_gradients(self, journey: Journey, sizes: _Sizes, write: Writer) -> list[Node]:
        """Write, in halves, the gradients of experts' weights that are made of rows with known halves."""
        rows = set(journey.rows)
        for node in list(nodes_after(journey.first)):
            if is_target(node, _WEIGHT) and node.args[1] in rows and summed(node.args[2], 0) is journey.received_RX:
                parts = [self._part(node, journey, sizes, half, write) for half in (0, 1)]
                replace_whole(node, write.like(node)(_aten.cat.default, parts))
                self.erased.add(node)
        return write.taken()

    def finish(self, places: dict[Node, float]) -> None:
        """Erase what was split; where something else reads it, its halves are joined."""
        for node in reversed(self._parts):
            if node.users:
                write = Writer(self._graph, node).like(node)
                whole = write(_aten.cat.default, self._parts[node])
                whole.meta["val"] = node.meta["val"]  # as many rows as before, also by the names of sizes
                places[whole] = max(places[part] for part in self._parts[node])
                replace_whole(node, whole)
            else:
                self._graph.erase_node(node)
        for node in self._replaced:
            self._graph.erase_node(node)


PASS = OverlapExpertParallel
