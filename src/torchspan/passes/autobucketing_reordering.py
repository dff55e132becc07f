"""Move FSDP's parameters and gradients in buckets of so many bytes, over the whole graph, while the graph computes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from torchspan.core.collectives import GATHER, SCATTER, reorder
from torchspan.core.errors import PassError
from torchspan.core.graph import Graph
from torchspan.core.overlap import Bucket, overlap, places_of, sink_waits, size_of
from torchspan.passes._base import Pass, PassContext, Stage, editable, refuse_writes
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

_MODULE = ""  # a bucket is of no one module


@dataclass(frozen=True)
class AutobucketingReordering(Pass):
    """Merges FSDP's collectives by bytes and lets them overlap with compute; every number stays bitwise what it was.

    Neighbours of one process group and dtype move together, up to `bucket_mb` MiB of whole parameters or gradients; a larger
    one moves alone. The first gather is of at most `first_mb`, or of one parameter, so that compute can begin early. With
    `overlap`, each gather begins when the one before it is waited for, each scatter is waited for after the next has begun, and
    every other collective just before what reads it. What is gathered again for the backward stays in the backward. Sums of
    gradients over copies of the model are merged as `transformer_block_bucketing` does.

    The order follows from the graph alone, so it is the same on every rank. torch has a pass for this, too (2.10 and later); it
    measures operators on a GPU, which a CPU refuses, and is for graphs of the forward or the backward alone.
    """

    name: ClassVar[str] = "autobucketing_reordering"
    summary: ClassVar[str] = "FSDP's collectives in buckets of bytes, over the whole graph, that overlap with compute"
    stage: ClassVar[Stage] = "communication"
    conflicts: ClassVar[tuple[str, ...]] = ("transformer_block_bucketing",)

    bucket_mb: float = 100.0
    first_mb: float = 1.0
    overlap: bool = True

    def require(self, graph: Graph) -> None:
        for option in ("bucket_mb", "first_mb"):
            if getattr(self, option) < 0:
                raise PassError(
                    f"{self.name}: {option} is {getattr(self, option):g}; expected 0, which merges nothing, or more"
                )
        refuse_writes(self.name, graph)

    def run(self, graph: Graph, context: PassContext) -> Graph:
        module = editable(graph)
        result = graph.with_module(module, str(self))
        places = places_of(module.graph)
        gathers, scatters, reduces = parameter_gathers(result), gradient_scatters(result), gradient_reduces(result)
        forward = [member for member in gathers if not member.is_of_backward]
        again = [member for member in gathers if member.is_of_backward]
        merged = of_two_ranks(reduces)
        buckets = {
            "forward": self._merge(result, self._buckets(forward, first_mb=self.first_mb), places),
            "again": self._merge(result, self._buckets(again, first_mb=self.first_mb), places),
            "scatters": self._merge(result, self._buckets(scatters), places),
        }
        self._merge(result, self._buckets(merged), places)
        if self.overlap:
            sink_waits(module.graph, places)
            overlap({GATHER: buckets["forward"], SCATTER: buckets["scatters"]}, places)
            overlap({GATHER: buckets["again"]}, places)
        reorder(module.graph, places)
        module.graph.eliminate_dead_code()
        module.recompile()
        self._record(graph, result, len(reduces) - len(merged), buckets, context)
        return result

    def ensure(self, before: Graph, after: Graph) -> None:
        """Fewer collectives or as many, and as many numbers moved by each kind in each group."""
        check_moved(self.name, before, after)

    def _buckets(self, members: Iterable[Member], first_mb: float | None = None) -> list[list[Member]]:
        """Neighbours of one group and dtype, by size, in the order of the graph; the very first of at most `first_mb`."""
        buckets: list[list[Member]] = []
        for group in grouped(members, lambda _: None):
            first = self.bucket_mb if buckets or first_mb is None else min(first_mb, self.bucket_mb)
            buckets += by_size(group, [first * 2**20, self.bucket_mb * 2**20])
        return buckets

    def _merge(self, graph: Graph, buckets: Sequence[Sequence[Member]], places: dict[Node, float]) -> list[Bucket]:
        """The collectives that take the place of those of each bucket; one of a single member stays as it is."""
        merged: list[Bucket] = []
        for bucket in buckets:
            size = size_of(bucket)
            if len(bucket) == 1:
                merged.append(Bucket([bucket[0].node], [bucket[0].wait], size))
            else:
                result = merge(graph, bucket, places, _MODULE)
                merged.append(Bucket(result.begin, result.end, size))
        return merged

    def _record(
        self, before: Graph, after: Graph, num_left: int, buckets: dict[str, list[Bucket]], context: PassContext
    ) -> None:
        if not any(buckets.values()):
            context.report.decide("pass", self.name, "nothing changed", "no parameter is gathered and no gradient scattered")
            return
        num = {what: len(group) for what, group in buckets.items()}
        what = changed(before, after) or "no collective can be merged"
        largest = max(bucket.size_bytes for group in buckets.values() for bucket in group)
        reason = (
            f"{num['forward']} gathers of parameters in the forward, {num['again']} in the backward, {num['scatters']} scatters"
            f" of gradients; the largest moves {largest / 2**20:.1f} MiB"
        )
        if num_left:
            reason += f"; {num_left} sums over more than two copies stay: merged, they would be rounded in another order"
        context.report.decide("pass", self.name, what, reason)


def by_size(members: Sequence[Member], caps_bytes: Sequence[float]) -> list[list[Member]]:
    """Neighbours, each list of at most as many bytes as its cap, or of one member; the last cap is that of all further ones."""
    buckets: list[list[Member]] = []
    for member in members:
        cap = caps_bytes[min(len(buckets), len(caps_bytes)) - 1] if buckets else 0.0
        if buckets and size_of([*buckets[-1], member]) <= cap:
            buckets[-1].append(member)
        else:
            buckets.append([member])
    return buckets


PASS = AutobucketingReordering
