"""Let parts of the sequence travel while others are multiplied: tensor parallelism's gathers and scatters, in chunks.

Shapes, as suffixes of names: R ranks, B batch, s the sequence of one rank, S that of all (R · s), C chunks, c the sequence of
one rank in one chunk (s / C), D and F widths, T tokens of all ranks (B · S), t those of one chunk (R · B · c).
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph as FxGraph
from torch.fx import Node

from torchspan.core.collectives import GATHER, SCATTER, is_call, reorder, value_of
from torchspan.core.errors import InputError, PassError
from torchspan.core.graph import Graph
from torchspan.core.registry import Registry
from torchspan.passes._base import Pass, PassContext, Stage, editable, refuse_writes
from torchspan.passes._sequence_collectives import (
    Gather,
    Scatter,
    erase,
    gathers,
    has_product,
    is_flat_view,
    is_product,
    light_ancestors,
    scatters,
)
from torchspan.passes._writer import Writer, is_pointwise, replace_whole, tensor_of
from torchspan.private.distributed import fused_products

_aten = torch.ops.aten


@dataclass(frozen=True)
class AsyncTensorParallel(Pass):
    """Pipelines a gather of the sequence with the products that read it, and products with a scatter of the sequence.

    On a GPU with symmetric memory, by torch's fused operators. Elsewhere in `chunks` parts: each part of every rank's sequence
    is gathered on its own, and multiplied while the next travels; each part of a product's rows is scattered while the next is
    computed. What a chunk would have fewer rows than `min_rows` for stays whole. A product of fewer rows may be rounded in
    another way, and so may a sum over more than two ranks; on a CPU, at the sizes tried, no bit differed on two ranks.
    """

    name: ClassVar[str] = "async_tensor_parallel"
    summary: ClassVar[str] = "a part of the sequence is gathered, or scattered, while another is multiplied"
    stage: ClassVar[Stage] = "communication"
    tolerance: ClassVar[float] = 1e-5

    chunks: int = 2
    min_rows: int = 128

    def require(self, graph: Graph) -> None:
        refuse_writes(self.name, graph)
        if self.chunks < 2 or self.min_rows < 1:
            raise InputError(
                f"{self.name} has chunks={self.chunks} and min_rows={self.min_rows}; expected 2 or more, and 1 or more"
            )

    def run(self, graph: Graph, context: PassContext) -> Graph:
        module = editable(graph)
        matches: list[Gather | Scatter] = [*gathers(module.graph), *scatters(module.graph)]
        if not matches:
            reason = (
                "no gather of the sequence feeds a product, and no product feeds a scatter: this graph has no such parallelism"
            )
            context.report.decide("pass", self.name, "nothing changed", reason)
            return graph.with_module(module, str(self))
        reason_not_fused = _why_not_fused(matches)
        left: Counter[str] = Counter()
        done = self._chunk(module.graph, matches, left) if reason_not_fused else _fuse(module.graph, matches, left)
        module.graph.eliminate_dead_code()
        module.recompile()
        self._record(done, left, reason_not_fused, context)
        return graph.with_module(module, str(self))

    def ensure(self, before: Graph, after: Graph) -> None:
        """As many numbers are moved as before, and no collective has more than one wait."""
        if _uses_fused(after):
            return
        if _moved(before) != _moved(after):
            raise PassError(f"{self.name} changed how many numbers are moved: {_moved(before)} before, {_moved(after)} after")

    def _chunk(self, graph: FxGraph, matches: Sequence[Gather | Scatter], left: Counter[str]) -> Counter[str]:
        places = {node: float(index) for index, node in enumerate(graph.nodes)}
        chunks, done = _Chunks(graph, self.chunks, places), Counter[str]()
        for match in matches:
            num_rows = match.num_tokens // self.chunks
            if match.sequence % self.chunks:
                left[f"the sequence of a rank, {match.sequence}, is no multiple of {self.chunks} chunks"] += 1
            elif num_rows < self.min_rows:
                left[f"{num_rows} rows a chunk; min_rows is {self.min_rows}"] += 1
            elif isinstance(match, Gather):
                chunks.gather(match)
                done["gathers with the products that read them"] += 1
            else:
                chunks.scatter(match)
                done["products with the scatters of their sums"] += 1
        chunks.finish()
        reorder(graph, places)
        return done

    def _record(self, done: Counter[str], left: Counter[str], reason: str | None, context: PassContext) -> None:
        way = "by torch's fused operators" if reason is None else f"in {self.chunks} chunks"
        why = "symmetric memory is here" if reason is None else f"no symmetric memory: {reason}"
        if done:
            choice = ", ".join(f"{count} {what}" for what, count in sorted(done.items()))
            context.report.decide("pass", self.name, f"{choice}, {way}", why)
        for cause, count in left.items():
            context.report.decide("pass", self.name, f"{count} left whole", cause)


# chunks


class _Chunks:
    """Writes gathers and scatters in chunks; a value of all tokens that is known by chunk is joined where it is read whole."""

    def __init__(self, graph: FxGraph, num_chunks: int, places: dict[Node, float]) -> None:
        self._graph, self._num_chunks, self._places = graph, num_chunks, places
        self._parts: dict[Node, list[Node]] = {}
        self._shapes: dict[Node, tuple[int, int, int]] = {}
        self._gathers: list[Gather] = []

    def gather(self, gather: Gather) -> None:
        """Write chunks of `gather`; weights are gathered before, as far as the products need them."""
        write = Writer(self._graph, gather.gathered).like(gather.node)
        shape = (gather.num_ranks, value_of(gather.gathered).shape[0], gather.sequence)
        width = self._width(shape)
        weights = sorted({node for product in gather.products for node in light_ancestors(product.args[1], gather.node) or []})
        late: set[Node] = set()
        for node in weights:
            if is_call(node, "wait_tensor") or any(parent in late for parent in node.all_input_nodes):
                late.add(node)
        sent = []
        for chunk in range(self._num_chunks):
            piece = write(_aten.slice.Tensor, gather.source, 1, chunk * width, (chunk + 1) * width)
            piece = write(_aten.clone.default, piece, memory_format=torch.contiguous_format)
            sent.append(write(gather.node.target, piece, *gather.node.args[1:]))  # type: ignore[arg-type]
        order = [*(node for node in weights if node not in late), *write.taken(), *sorted(late)]
        for begun in sent:
            arrived = write.like(gather.node)(gather.wait.target, begun)  # type: ignore[arg-type]
            rows = write(_aten.view.default, arrived, [-1, value_of(arrived).shape[-1]])
            self._add(gather.gathered, rows, shape)
            for product in gather.products:
                self._add(product, write.like(product)(product.target, rows, *product.args[1:]), shape)  # type: ignore[arg-type]
        self._place([*order, *write.taken()], self._places[gather.node])
        self._gathers.append(gather)

    def scatter(self, scatter: Scatter) -> None:
        """Write chunks of `scatter`, and of what it is made of."""
        write = Writer(self._graph, scatter.wait)
        shape = (scatter.num_ranks, value_of(scatter.summed).shape[0], scatter.sequence)
        arrived, whole = [], tuple(value_of(scatter.summed).shape)
        for chunk in range(self._num_chunks):
            rows = self._chunk(scatter.summed, chunk, shape, whole, write)
            write.like(scatter.node)
            parts = write(_aten.view.default, rows, [shape[0] * shape[1], self._width(shape), whole[2]])
            arrived.append(write(scatter.node.target, parts, *scatter.node.args[1:]))  # type: ignore[arg-type]
        waits = [write(scatter.wait.target, node) for node in arrived]  # type: ignore[arg-type]
        joined = write(_aten.cat.default, waits, 1)
        self._place(write.taken(), self._places[scatter.node])
        replace_whole(scatter.wait, joined)
        self._graph.erase_node(scatter.node)

    def finish(self) -> None:
        """Join what is read whole, and erase what was written in chunks."""
        for node in reversed(self._parts):
            if node.users:
                write = Writer(self._graph, node).like(node)
                replace_whole(node, self._joined(node, write))
                for place, part in enumerate(written := write.taken()):
                    latest = max(self._places[chunk] for chunk in self._parts[node])
                    self._places[part] = latest + (place + 1) * 1e-9 / len(written)
            else:
                self._graph.erase_node(node)
        for gather in self._gathers:
            erase(gather)

    def _add(self, node: Node, part: Node, shape: tuple[int, int, int]) -> None:
        self._parts.setdefault(node, []).append(part)
        self._shapes[node] = shape

    def _width(self, shape: tuple[int, int, int]) -> int:
        return shape[2] // self._num_chunks

    def _chunk(self, node: Node, chunk: int, shape: tuple[int, int, int], whole: tuple[int, ...], write: Writer) -> Node:
        """The chunk's rows (t, F) of `node`, which has a value for each token."""
        known = self._parts.get(node, [])
        if len(known) > chunk and self._shapes[node] == shape:
            return known[chunk]
        value = value_of(node)
        if is_flat_view(node):
            return self._chunk(node.args[0], chunk, shape, whole, write)  # type: ignore[arg-type]
        wide = (*whole[:2], value.shape[-1])
        if is_product(node):
            rows = self._chunk(node.args[0], chunk, shape, whole, write)  # type: ignore[arg-type]
            part = write.like(node)(node.target, rows, node.args[1])  # type: ignore[arg-type]
        elif has_product(node, wide) or self._is_of_chunks(node):
            parts = {source: self._chunk(source, chunk, shape, whole, write) for source in node.all_input_nodes}
            part = write.again(node, parts)
        else:
            return self._cut(node, chunk, shape, write.like(node))
        self._add(node, part, shape)
        return part

    def _is_of_chunks(self, node: Node) -> bool:
        """Whether `node` is computed, token by token, of what is known by chunk."""
        value = value_of(node)
        inputs = [source.args[0] if is_flat_view(source) else source for source in node.all_input_nodes]
        alike = all(tensor_of(source) is not None and value_of(source).shape == value.shape for source in node.all_input_nodes)
        return is_pointwise(node) and alike and any(source in self._parts for source in inputs)

    def _cut(self, node: Node, chunk: int, shape: tuple[int, int, int], write: Writer) -> Node:
        num_ranks, batch, _ = shape
        parts = write(_aten.view.default, node, [batch, num_ranks, self._num_chunks, self._width(shape), -1])
        rows = write(_aten.transpose.int, write(_aten.select.int, parts, 2, chunk), 0, 1)
        rows = write(_aten.clone.default, rows, memory_format=torch.contiguous_format)
        return write(_aten.view.default, rows, [-1, value_of(node).shape[-1]])

    def _joined(self, node: Node, write: Writer) -> Node:
        num_ranks, batch, _ = self._shapes[node]
        width = self._width(self._shapes[node])
        parts = []
        for part in self._parts[node]:
            wide = write(_aten.view.default, part, [num_ranks, batch, width, -1])
            parts.append(write(_aten.transpose.int, wide, 0, 1))
        stacked = write(_aten.stack.default, parts, 2)
        return write(_aten.view.default, stacked, list(value_of(node).shape))

    def _place(self, nodes: Sequence[Node], at: float) -> None:
        for step, node in enumerate(nodes):
            self._places[node] = at - 1 + (step + 1) / (len(nodes) + 1)


# fused


def _why_not_fused(matches: Sequence[Gather | Scatter]) -> str | None:
    """Why torch's fused operators cannot be used, or None."""
    # by the registry: both are plug-ins of one level, and neither knows the other's file
    facade: Any = Registry("torchspan.backports", "backport").get("symmetric_memory")
    support = facade.SymmetricMemory.query(value_of(matches[0].wait).device)
    return None if support.is_available else str(support.reason)


def _fuse(graph: FxGraph, matches: Sequence[Gather | Scatter], left: Counter[str]) -> Counter[str]:
    """Write torch's fused operators."""
    gather_products, product_scatter = fused_products(sorted({str(match.node.args[-1]) for match in matches}))
    done: Counter[str] = Counter()
    for match in matches:
        if isinstance(match, Gather):
            last = max(match.products)
            write = Writer(graph, last).like(match.node)
            both = write(gather_products, match.source, [p.args[1] for p in match.products], 1, match.node.args[-1])
            results = write(operator.getitem, both, 1)
            whole = write(operator.getitem, both, 0)
            for index, product in enumerate(match.products):
                flat = write.like(product)(operator.getitem, results, index)
                replace_whole(product, write(_aten.reshape.default, flat, list(value_of(product).shape)))
            replace_whole(match.gathered, whole)
            erase(match)
            done["gathers with the products that read them"] += 1
        else:
            summed = match.summed.args[0] if is_flat_view(match.summed) else None
            if not isinstance(summed, Node) or not is_product(summed):
                left["a sum of several products is scattered; the fused operator takes one"] += 1
                continue
            write = Writer(graph, match.wait).like(match.node)
            shape = [*value_of(match.summed).shape[:2], -1]
            rows = write(_aten.reshape.default, summed.args[0], shape)
            fused = write(product_scatter, rows, summed.args[1], "sum", 1, match.node.args[-1])
            replace_whole(match.wait, fused)
            graph.erase_node(match.node)
            done["products with the scatters of their sums"] += 1
    reorder(graph, {})
    return done


def _uses_fused(graph: Graph) -> bool:
    return any(target.startswith("symm_mem.") for target in graph.count_targets())


def _moved(graph: Graph) -> Counter[tuple[str, str]]:
    """How many numbers each kind of collective moves in each group."""
    moved: Counter[tuple[str, str]] = Counter()
    for node in graph.module.graph.nodes:
        for kind in (GATHER, SCATTER):
            if is_call(node, kind):
                moved[kind, str(node.args[-1])] += value_of(node.args[0]).numel()
    return moved


PASS = AsyncTensorParallel
