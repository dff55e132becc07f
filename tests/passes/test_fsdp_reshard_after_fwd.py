"""Resharding in a graph: what is gathered again, and what is kept. That numbers stay bitwise: tests/train, on real ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch.fx import Node

from torchspan.capture.joint import capture_joint, is_supported
from torchspan.capture.train_step import capture_train_step
from torchspan.core.collectives import is_call, origin_of, value_of, wait_for
from torchspan.core.errors import PassError
from torchspan.core.graph import Graph
from torchspan.passes._base import PassContext
from torchspan.passes._pipeline import Pipeline
from torchspan.passes.fsdp_reshard_after_fwd import FsdpReshardAfterFwd, kept_bytes

CAPTURES = [capture_train_step, *([capture_joint] if is_supported() else [])]


def _gathered(graph: Graph) -> dict[str, list[tuple[int, Node]]]:
    """Each parameter's gathers, with their places."""
    names = {node: spec.name for node, spec in zip(graph.placeholders(), graph.inputs)}
    results: dict[str, list[tuple[int, Node]]] = {}
    for index, node in enumerate(graph.module.graph.nodes):
        if is_call(node, "all_gather_into_tensor") and (origin := origin_of(node.args[0])) is not None:
            results.setdefault(names[origin], []).append((index, node))
    return results


def _twice(graph: Graph) -> set[str]:
    return {name for name, gathers in _gathered(graph).items() if len(gathers) == 2}


def _last_reads(graph: Graph) -> dict[str, int]:
    """Where each parameter's first gather, or a view of it, is read last."""
    index = {node: i for i, node in enumerate(graph.module.graph.nodes)}
    last = {}
    for name, gathers in _gathered(graph).items():
        todo, places = [wait_for(gathers[0][1])], []
        while todo:
            node = todo.pop()
            assert node is not None
            places.append(index[node])
            todo += [user for user in node.users if str(user.target).startswith(("aten.view", "aten.t.", "aten.as_strided"))]
            places += [index[user] for user in node.users]
        last[name] = max(places)
    return last


@pytest.mark.parametrize("capture", CAPTURES)
def test_what_the_backward_reads_is_gathered_again_and_nothing_is_kept(sharded: Any, capture: Any) -> None:
    before, context = sharded(8, 1, capture), PassContext()
    after = Pipeline((FsdpReshardAfterFwd(),)).run(before, context)
    gathered = _gathered(after)
    assert _twice(after) == set(gathered) - {"model.tok_embeddings.weight"}, "an embedding's derivative reads no weight"
    border = min(gathers[1][0] for gathers in gathered.values() if len(gathers) == 2)
    assert max(_last_reads(after).values()) < border < max(_last_reads(before).values())
    saved = sum(4 * value_of(gathers[1][1]).numel() for gathers in gathered.values() if len(gathers) == 2)
    (decision,) = context.report.decisions
    assert decision.choice == f"20 parameters gathered again, {saved} bytes not kept"
    assert (kept_bytes(before), kept_bytes(after)) == (saved, 0)


def test_it_gathers_again_what_the_policy_of_the_program_does(sharded: Any) -> None:
    after = Pipeline((FsdpReshardAfterFwd(),)).run(sharded(8, 1))
    policy = sharded(8, 1, reshard=True)
    assert _twice(after) == _twice(policy) and after.num_collectives() == policy.num_collectives()


def test_the_last_block_can_be_kept_and_modules_can_be_chosen(sharded: Any) -> None:
    graph = sharded(8, 1)
    resharded = Pipeline((FsdpReshardAfterFwd(keep_last=True),)).run(graph)
    assert {name.split(".")[2] for name in _twice(resharded)} == {"0"} and len(_twice(resharded)) == 9
    chosen = Pipeline((FsdpReshardAfterFwd(modules="*.attention|*.norm"),)).run(graph)
    expected = {name for name in _gathered(graph) if ".attention." in name or name == "model.norm.weight"}
    assert _twice(chosen) == expected and 0 < kept_bytes(chosen) < kept_bytes(graph)


def test_it_is_done_once_and_finds_nothing_to_do_in_one_process(sharded: Any, graph: Graph) -> None:
    once = Pipeline((FsdpReshardAfterFwd(),)).run(sharded(8, 1))
    for version in (once, graph):
        context = PassContext()
        after = Pipeline((FsdpReshardAfterFwd(),)).run(version, context)
        assert after.count_targets() == version.count_targets()
        assert [decision.choice for decision in context.report.decisions] == ["nothing changed"]


def test_blocks_are_gathered_apart_in_the_forward_and_in_the_backward(sharded: Any) -> None:
    after = Pipeline.parse("fsdp_reshard_after_fwd,transformer_block_bucketing").run(sharded(8, 1))
    counts = after.num_collectives()
    # two blocks, embedding, norm and output; then all of that but the embedding again
    assert (counts["all_gather_into_tensor"], counts["reduce_scatter_tensor"]) == (5 + 4, 5)


def test_a_graph_without_a_backward_and_unknown_modules_are_refused(sharded: Any) -> None:
    graph = sharded(8, 1)
    with pytest.raises(PassError, match="needs a graph with a backward; expected one of kind train_step or joint"):
        FsdpReshardAfterFwd().require(replace(graph, kind="forward"))
    with pytest.raises(PassError, match=r"of a module that answers to '\*.attentoin'; there is model."):
        FsdpReshardAfterFwd(modules="*.attentoin").require(graph)


def test_a_graph_that_keeps_what_was_meant_does_not_pass(sharded: Any) -> None:
    graph = sharded(8, 1)
    with pytest.raises(PassError, match="left 20 gathered parameters to be kept"):
        FsdpReshardAfterFwd().ensure(graph, graph)
