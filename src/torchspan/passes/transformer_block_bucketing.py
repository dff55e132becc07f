"""Gather the FSDP parameters of one transformer block in one all-gather, and scatter their gradients in one reduce-scatter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torchspan.core.collectives import reorder
from torchspan.core.graph import Graph
from torchspan.core.overlap import places_of
from torchspan.passes._base import Pass, PassContext, Stage, editable, refuse_writes
from torchspan.passes._blocks import block_of
from torchspan.passes._fsdp import (
    Member,
    changed,
    check_moved,
    gradient_reduces,
    gradient_scatters,
    grouped,
    merge,
    of_two_ranks,
    parameter_gathers,
)


@dataclass(frozen=True)
class TransformerBlockBucketing(Pass):
    """Merges collectives by block, process group and dtype; every number stays bitwise what it was.

    A block is what a parameter's name says up to its first number: ``layers.3`` of ``layers.3.attention.wq.weight``. Gathered
    are parameters that are read where they are stored; a gather of anything that was computed stays where it is. Experts are
    stored on a mesh of their own and move in a collective of their own. With two copies of the model (hybrid sharding) the sums
    of gradients over them are merged; with more they stay, as the order of a sum would depend on what moves with it. With
    `gather` or `scatter` false, that half is left alone.
    """

    name: ClassVar[str] = "transformer_block_bucketing"
    summary: ClassVar[str] = "one all-gather and one reduce-scatter a transformer block, in place of one a parameter"
    stage: ClassVar[Stage] = "communication"
    conflicts: ClassVar[tuple[str, ...]] = ("autobucketing_reordering",)

    gather: bool = True
    scatter: bool = True

    def require(self, graph: Graph) -> None:
        refuse_writes(self.name, graph)

    def run(self, graph: Graph, context: PassContext) -> Graph:
        module = editable(graph)
        result = graph.with_module(module, str(self))
        places = places_of(module.graph)
        reduces = gradient_reduces(result) if self.scatter else []
        merged = of_two_ranks(reduces)
        gathers = parameter_gathers(result) if self.gather else []
        scatters = gradient_scatters(result) if self.scatter else []
        for members in (gathers, scatters, merged):
            for block, bucket in _buckets(members):
                merge(result, bucket, places, block)
        reorder(module.graph, places)
        module.graph.eliminate_dead_code()
        module.recompile()
        self._record(graph, result, len(reduces) - len(merged), context)
        return result

    def ensure(self, before: Graph, after: Graph) -> None:
        """Fewer collectives or as many, and as many numbers moved by each kind in each group."""
        check_moved(self.name, before, after)

    def _record(self, before: Graph, after: Graph, num_left: int, context: PassContext) -> None:
        what = changed(before, after)
        reason = "parameters of one block move together" if what else "no block has two FSDP parameters that can be merged"
        if num_left:
            reason += f"; {num_left} sums over more than two copies stay: merged, they would be rounded in another order"
        context.report.decide("pass", self.name, what or "nothing changed", reason)


def _buckets(members: Iterable[Member]) -> list[tuple[str, list[Member]]]:
    """Members of one block that move together, two or more, with the block."""
    of_blocks = [member for member in members if block_of(member.name) is not None]
    buckets = grouped(of_blocks, lambda member: block_of(member.name))
    return [(block_of(bucket[0].name) or "", bucket) for bucket in buckets if len(bucket) > 1]


PASS = TransformerBlockBucketing
