"""Groups of their own: which collectives get them, and that names make them again. Numbers: tests/train, on real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from torchspan.core.errors import PassError
from torchspan.core.graph import Graph
from torchspan.passes._base import PassContext
from torchspan.passes._groups import create_named_groups
from torchspan.passes._pipeline import Pipeline
from torchspan.passes.separate_process_groups import SeparateProcessGroups
from torchspan.private import distributed


def _talks(graph: Graph) -> dict[str, set[str]]:
    """The kinds of collectives in each group."""
    results: dict[str, set[str]] = {}
    for node in graph.module.graph.nodes:
        if str(node.target).startswith(("_c10d_functional.", "torchspan.")) and isinstance(node.args[-1], str):
            results.setdefault(node.args[-1], set()).add(str(node.target).split(".")[1])
    return results


def test_parameters_and_gradients_get_groups_of_the_same_ranks_and_nothing_else_does(experts: Any) -> None:
    before = experts(dp_shard=4, tp=2, ep=4)
    context = PassContext()
    after = Pipeline((SeparateProcessGroups(),)).run(before, context)
    old, new = _talks(before), _talks(after)
    added = {name: kinds for name, kinds in new.items() if name not in old}
    # dp_shard is ranks 0, 2, 4, 6; ep_shard 0 and 4; tp 0 and 1, which sums up the gradients of norms
    assert added == {
        "torchspan.parameters[0:7:2]": {"all_gather_into_tensor"},
        "torchspan.parameters[0:5:4]": {"all_gather_into_tensor"},
        "torchspan.gradients[0:7:2]": {"reduce_scatter_tensor"},
        "torchspan.gradients[0:5:4]": {"reduce_scatter_tensor"},
        "torchspan.gradients[0:2:1]": {"all_reduce"},
    }
    assert distributed.group_ranks("torchspan.parameters[0:5:4]") == [0, 4]
    remaining = {name: kinds for name, kinds in new.items() if name in old}
    assert set().union(*remaining.values()) >= {"all_to_all_rows", "all_to_all_single", "all_gather_into_tensor"}
    (decision,) = context.report.decisions
    assert decision.choice.startswith("47 gathers of parameters, ") and "torchspan.gradients[0:5:4]" in decision.reason


@pytest.mark.parametrize("bucketing", ["transformer_block_bucketing", "autobucketing_reordering"])
def test_buckets_move_in_them_too(sharded: Any, bucketing: str) -> None:
    after = Pipeline.parse(f"{bucketing},separate_process_groups").run(sharded(8, 1))
    ranks = "[0:8:1]"
    assert _talks(after) == {
        f"torchspan.parameters{ranks}": {"all_gather_into_tensor"},
        f"torchspan.gradients{ranks}": {"reduce_scatter_tensor"},
    }


def test_either_half_can_be_left_alone(sharded: Any) -> None:
    graph = sharded(8, 1)
    for option, kind in (("parameters", "all_gather_into_tensor"), ("gradients", "reduce_scatter_tensor")):
        talks = _talks(Pipeline((SeparateProcessGroups(**{option: False}),)).run(graph))
        assert [kinds for name, kinds in talks.items() if not name.startswith("torchspan.")] == [{kind}]


def test_groups_are_made_once_and_are_gone_with_the_job(sharded: Any) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    graph = sharded(8, 1)
    after = Pipeline((SeparateProcessGroups(),)).run(graph)
    names = sorted(_talks(after))
    assert create_named_groups(after) == [] and sorted(_talks(Pipeline((SeparateProcessGroups(),)).run(graph))) == names
    dist.destroy_process_group()
    assert not any(distributed.find_group(name) for name in names)
    dist.init_process_group("fake", rank=1, world_size=8, store=FakeStore())
    assert sorted(create_named_groups(after)) == names, "a graph that was saved finds its groups in a new job"
    assert distributed.group_ranks(names[0]) == list(range(8))


def test_a_job_that_is_too_small_or_not_there_is_told(sharded: Any) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    graph = sharded(8, 1)
    after = Pipeline((SeparateProcessGroups(),)).run(graph)
    dist.destroy_process_group()
    with pytest.raises(PassError, match=r"talks in the group torchspan\.\w+\[0:8:1\], and this process is of no job"):
        create_named_groups(after)
    with pytest.raises(PassError, match="which this process does not have; run it in the job that the graph was captured in"):
        SeparateProcessGroups().run(graph, PassContext())
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    with pytest.raises(PassError, match=r"is not one of 4 ranks, which this job has"):
        create_named_groups(after)


def test_it_finds_nothing_to_do_in_one_process(graph: Graph) -> None:
    context = PassContext()
    after = Pipeline((SeparateProcessGroups(),)).run(graph, context)
    assert after.count_targets() == graph.count_targets()
    assert [decision.choice for decision in context.report.decisions] == ["nothing changed"]
