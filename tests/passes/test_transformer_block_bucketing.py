"""Bucketing: how many collectives are left, and which are left alone. That numbers stay bitwise: tests/train, on real ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from torchspan.capture.joint import capture_joint, is_supported
from torchspan.capture.train_step import capture_train_step
from torchspan.core.collectives import is_call
from torchspan.core.graph import Graph
from torchspan.core.report import Report
from torchspan.passes._base import PassContext
from torchspan.passes._blocks import block_of
from torchspan.passes.transformer_block_bucketing import TransformerBlockBucketing
from torchspan.private.distributed import group_ranks

CAPTURES = [capture_train_step, *([capture_joint] if is_supported() else [])]


def _run(graph: Graph, **options: bool) -> Graph:
    pass_ = TransformerBlockBucketing(**options)
    pass_.require(graph)
    after = pass_.run(graph, PassContext())
    after.verify()
    pass_.ensure(graph, after)
    return after


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_block_has_one_gather_and_one_scatter(sharded: Any, capture: Any) -> None:
    counts = _run(sharded(8, 1, capture)).num_collectives()
    # two blocks, and embedding, norm and output beside them
    assert (counts["all_gather_into_tensor"], counts["reduce_scatter_tensor"]) == (5, 5)


@pytest.mark.parametrize("capture", CAPTURES)
def test_collectives_of_tensor_parallelism_stay_as_they_are(sharded: Any, capture: Any) -> None:
    before = sharded(4, 2, capture)
    after = _run(before)
    group = next(node.args[-1] for node in before.module.graph.nodes if "all_gather" in str(node.target))

    def others(graph: Graph) -> list[str]:
        nodes = [node for node in graph.module.graph.nodes if "_c10d_functional" in str(node.target)]
        return [str(node.target) for node in nodes if "wait" not in str(node.target) and node.args[-1] != group]

    assert others(after) == others(before) and len(others(before)) > 10
    assert before.num_collectives()["all_gather_into_tensor"] - after.num_collectives()["all_gather_into_tensor"] == 16
    assert before.num_collectives()["reduce_scatter_tensor"] - after.num_collectives()["reduce_scatter_tensor"] == 16


def test_either_half_can_be_left_alone(sharded: Any) -> None:
    graph = sharded(8, 1)
    gathered, scattered = _run(graph, scatter=False).num_collectives(), _run(graph, gather=False).num_collectives()
    assert (gathered["all_gather_into_tensor"], gathered["reduce_scatter_tensor"]) == (5, 21)
    assert (scattered["all_gather_into_tensor"], scattered["reduce_scatter_tensor"]) == (21, 5)


def test_mixed_precision_is_bucketed_in_the_dtypes_that_move(sharded: Any) -> None:
    import torch

    before = sharded(8, 1, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    after = _run(before)
    moved = {
        str(node.target): node.args[0].meta["val"].dtype
        for node in after.module.graph.nodes
        if "_c10d_functional" in str(node.target) and "wait" not in str(node.target)
    }
    assert set(moved.values()) == {torch.bfloat16, torch.float32}
    assert after.num_collectives()["all_gather_into_tensor"] == 5


def test_experts_of_a_block_move_together_in_their_own_group(experts: Any) -> None:
    before = experts(dp_shard=4, tp=2, ep=4)
    after = _run(before)

    def moved(graph: Graph, kind: str) -> Counter[str]:
        """How often each group that has parameters calls a kind of collective; not that of tensor parallelism."""
        nodes = [node for node in graph.module.graph.nodes if is_call(node, kind)]
        return Counter(ranks for node in nodes if (ranks := str(group_ranks(node.args[-1]))) != "[0, 1]")

    for kind in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        # six parameters of experts in two layers, on ep_shard; of the others 38 in three layers, embedding, norm and output
        assert moved(before, kind) == {"[0, 4]": 6, "[0, 2, 4, 6]": 41}
        assert moved(after, kind) == {"[0, 4]": 2, "[0, 2, 4, 6]": 6}


@pytest.mark.parametrize(
    ("num_copies", "num_merged", "suffix"), [(2, 41, ""), (4, 0, "; 47 sums over more than two copies stay")]
)
def test_sums_over_two_copies_move_together_and_over_more_stay(
    experts: Any, num_copies: int, num_merged: int, suffix: str
) -> None:
    before, context = experts(dp_replicate=num_copies, dp_shard=8 // num_copies), PassContext()
    after = TransformerBlockBucketing().run(before, context)
    assert before.num_collectives()["all_reduce"] - after.num_collectives()["all_reduce"] == num_merged
    assert context.report.decisions[0].reason.startswith(f"parameters of one block move together{suffix}")


def test_it_is_done_once_and_finds_nothing_to_do_in_one_process(sharded: Any, graph: Graph) -> None:
    once = _run(sharded(8, 1))
    assert _run(once).num_collectives() == once.num_collectives()
    report = Report()
    TransformerBlockBucketing().run(graph, PassContext(report))
    assert [decision.choice for decision in report.decisions] == ["nothing changed"]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("layers.0.wq.weight", "layers.0"),
        ("model.h.11.mlp.0.weight", "model.h.11"),
        ("0.weight", "0"),
        ("norm.weight", None),
        ("w2.weight", None),
    ],
)
def test_a_block_is_a_name_up_to_its_first_number(name: str, block: str | None) -> None:
    assert block_of(name) == block
