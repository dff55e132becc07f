"""Bucketing: how many collectives are left, and which are left alone. That numbers stay bitwise: tests/train, on real ranks."""

from __future__ import annotations

from typing import Any

import pytest

from torchspan.capture.joint import capture_joint, is_supported
from torchspan.capture.train_step import capture_train_step
from torchspan.core.graph import Graph
from torchspan.core.report import Report
from torchspan.passes._base import PassContext
from torchspan.passes._blocks import block_of
from torchspan.passes.transformer_block_bucketing import TransformerBlockBucketing

CAPTURES = [capture_train_step, *([capture_joint] if is_supported() else [])]


def _run(graph: Graph, **options: bool) -> Graph:
    one = TransformerBlockBucketing(**options)
    one.require(graph)
    after = one.run(graph, PassContext())
    after.verify()
    one.ensure(graph, after)
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
