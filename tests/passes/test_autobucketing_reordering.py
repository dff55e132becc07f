"""Buckets by bytes: how many collectives are left, in which order. That numbers stay bitwise: tests/train, on real ranks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from torchspan.capture.joint import capture_joint, is_supported
from torchspan.capture.train_step import capture_train_step
from torchspan.core.collectives import is_call, value_of
from torchspan.core.errors import InputError, PassError
from torchspan.core.graph import Graph
from torchspan.passes._base import PassContext
from torchspan.passes._pipeline import Pipeline
from torchspan.passes.autobucketing_reordering import AutobucketingReordering

CAPTURES = [capture_train_step, *([capture_joint] if is_supported() else [])]
GATHER, SCATTER = "all_gather_into_tensor", "reduce_scatter_tensor"


def _run(graph: Graph, **options: Any) -> Graph:
    return Pipeline((AutobucketingReordering(**options),)).run(graph)


def _spans(graph: Graph, kind: str) -> list[tuple[int, int]]:
    """Where each collective of a kind begins and is waited for."""
    index = {node: i for i, node in enumerate(graph.module.graph.nodes)}
    return [(index[node], index[next(iter(node.users))]) for node in index if is_call(node, kind)]


@pytest.mark.parametrize("capture", CAPTURES)
def test_all_parameters_move_at_twice_and_all_gradients_at_once(sharded: Any, capture: Any) -> None:
    counts = _run(sharded(8, 1, capture), first_mb=0.05).num_collectives()
    assert (counts[GATHER], counts[SCATTER]) == (2, 1)


@pytest.mark.parametrize("capture", CAPTURES)
def test_tensor_parallel_collectives_are_as_many_as_before(sharded: Any, capture: Any) -> None:
    before = sharded(4, 2, capture)
    counts, after = before.num_collectives(), _run(before).num_collectives()
    # 21 parameters; all of them fit into the first bucket
    assert (counts[GATHER] - after[GATHER], counts[SCATTER] - after[SCATTER]) == (20, 20)
    assert counts["all_reduce"] == after["all_reduce"]


def test_a_bucket_is_no_larger_than_asked_and_the_first_is_smaller(sharded: Any) -> None:
    after = _run(sharded(8, 1), bucket_mb=0.06, first_mb=0.04)
    gathered = [value_of(node).numel() * 4 / 2**20 for node in after.module.graph.nodes if is_call(node, GATHER)]
    alone = 256 * 32 * 4 / 2**20  # of the embedding; nothing larger is in the model
    assert alone < gathered[0] <= 0.04 and max(gathered) <= 0.06 and len(gathered) > 2
    assert len(gathered) <= 2 * sum(gathered) / 0.06 + 2, "two neighbours would fit into one bucket"


def test_a_gather_begins_before_the_wait_for_the_one_before_it_and_a_scatter_is_waited_for_after_the_next(sharded: Any) -> None:
    before = sharded(8, 1)
    after = _run(before, bucket_mb=0.02, first_mb=0.02)
    for graph, overlaps in ((before, False), (after, True)):
        for kind in (GATHER, SCATTER):
            spans = _spans(graph, kind)
            assert len(spans) > 3 and spans == sorted(spans, key=lambda span: span[1]), (
                "waited for in the order in which they begin"
            )
            assert all((begins < waited) is overlaps for (_, waited), (begins, _) in pairwise(spans)), kind
    assert all(begins > waited for (_, waited), (begins, _) in zip(_spans(after, GATHER), _spans(after, GATHER)[2:])), (
        "only one gather is ahead"
    )


def test_without_overlap_a_collective_is_waited_for_where_it_begins(sharded: Any) -> None:
    after = _run(sharded(8, 1), bucket_mb=0.02, first_mb=0.02, overlap=False)
    assert len(_spans(after, GATHER)) > 3
    assert all(waited == begins + 1 for kind in (GATHER, SCATTER) for begins, waited in _spans(after, kind))


def test_what_is_gathered_again_stays_in_the_backward(sharded: Any) -> None:
    again = Pipeline.parse("fsdp_reshard_after_fwd,autobucketing_reordering{bucket_mb=0.02}").run(sharded(8, 1))
    nodes = list(again.module.graph.nodes)
    first_backward = next(i for i, node in enumerate(nodes) if node.meta.get("custom", {}).get("phase") == "backward")
    backward = [i for i, node in enumerate(nodes) if is_call(node, GATHER) and "phase" in node.meta["custom"]]
    assert len(backward) > 2 and backward[0] >= first_backward
    forward_waits = [waited for begins, waited in _spans(again, GATHER) if begins not in backward]
    assert max(forward_waits) < first_backward


def test_experts_move_apart_as_they_are_on_a_mesh_of_their_own(experts: Any) -> None:
    before = experts(dp_shard=4, tp=2, ep=4)
    context = PassContext()
    after = Pipeline((AutobucketingReordering(),)).run(before, context)
    (decision,) = context.report.decisions
    assert decision.reason.startswith("2 gathers of parameters in the forward, 0 in the backward, 2 scatters of gradients")
    counts, counts_after = before.num_collectives(), after.num_collectives()
    assert all(counts[kind] == counts_after[kind] for kind in ("all_to_all_rows", "all_to_all_single"))


def test_it_finds_nothing_to_do_in_one_process_and_refuses_a_negative_size(graph: Graph) -> None:
    context = PassContext()
    after = Pipeline((AutobucketingReordering(),)).run(graph, context)
    assert [decision.choice for decision in context.report.decisions] == ["nothing changed"]
    assert after.count_targets() == graph.count_targets()
    with pytest.raises(PassError, match=r"bucket_mb is -1; expected 0, which merges nothing, or more"):
        AutobucketingReordering(bucket_mb=-1.0).require(graph)


def test_it_is_not_beside_bucketing_by_block() -> None:
    with pytest.raises(InputError, match="do the same work in two ways"):
        Pipeline.parse("autobucketing_reordering,transformer_block_bucketing")
