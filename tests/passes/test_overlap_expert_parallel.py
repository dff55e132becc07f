"""Overlap of expert parallelism: in what order a graph runs; and its numbers, in a group of one rank that sends to itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from torchspan.capture._state import BoundGraph
from torchspan.capture.joint import capture_joint, is_supported
from torchspan.capture.train_step import capture_train_step
from torchspan.core.graph import Graph
from torchspan.core.program import Program
from torchspan.core.report import Report
from torchspan.models._moe import MoE
from torchspan.models.deepseek_v3 import FLAVOURS
from torchspan.parallel.expert_parallel import apply_expert_parallel
from torchspan.passes._base import PassContext
from torchspan.passes.overlap_expert_parallel import OverlapExpertParallel

CONFIG = replace(FLAVOURS["tiny"], expert_dim=32)
CAPTURES = [capture_train_step, *([capture_joint] if is_supported() else [])]
SHARED, ROUTED, SEND = ["mm"], ["grouped_rows_mm"], ["all_to_all_rows"]


class Layer(nn.Module):
    """The loss of a mixture of experts, which are on the ranks of a group, of what a matrix makes of the input."""

    def __init__(self, num_ranks: int, **sizes: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = replace(CONFIG, **sizes)
        self.before, self.moe = nn.Linear(config.dim, config.dim, bias=False), MoE(config)
        for parameter in self.moe.parameters():
            nn.init.normal_(parameter, std=0.1)
        mesh = init_device_mesh("cpu", (num_ranks,), mesh_dim_names=("ep",))
        apply_expert_parallel(self.moe, {"experts": "experts"}, mesh, ())
        for name, parameter in list(self.moe.experts.named_parameters()):  # as SimpleFSDP gives them to the module
            assert isinstance(parameter, DTensor)
            self.moe.experts.register_parameter(name, nn.Parameter(parameter.to_local().detach().clone()))

    def forward(self, x_BSD: Tensor) -> Tensor:
        return (self.moe(self.before(x_BSD)) + x_BSD).square().mean()


def batch(seed: int) -> Tensor:
    return torch.randn(2, 12, CONFIG.dim, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As each of several ranks on a CPU has; with two, halves have other bits and stay whole."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def alone() -> Iterator[None]:
    """A real group of this process alone: what it sends, it receives."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.fixture
def one_of_two() -> Iterator[None]:
    """A group of two ranks of which this process is the first; nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def run(graph: Graph, **options: bool) -> tuple[Graph, list[str]]:
    """The graph after the pass, and what was decided."""
    pass_, report = OverlapExpertParallel(**options), Report()
    pass_.require(graph)
    after = pass_.run(graph, PassContext(report))
    after.verify()
    pass_.ensure(graph, after)
    return after, [f"{decision.choice}: {decision.reason}" for decision in report.decisions]


def order_of(graph: Graph) -> list[str]:
    """The exchanges and products of a graph, in order."""
    expected = ("all_to_all_rows", "grouped_rows_mm", "grouped_rows_mm_weight", "mm")
    called = [str(node.target).split(".") for node in graph.module.graph.nodes if node.op == "call_function"]
    return [name[1] for name in called if len(name) == 3 and name[1] in expected]


@pytest.mark.parametrize("capture", CAPTURES)
def test_every_bit_of_a_step_is_eagers_whatever_the_experts_get(alone: None, capture: Any) -> None:
    eager, program = Layer(1), Layer(1)
    graph, decided = run(capture(Program(program, (batch(0),))))
    assert decided[0].startswith("2 of 2 journeys of rows, forward and backward, in two halves by expert")
    step = BoundGraph(graph, program)
    for seed in (0, 1, 2):
        for model in (eager, program):
            model.zero_grad()
            if seed == 2:  # no token chooses an expert of the first half
                model.get_buffer("moe.balance.bias_E")[:4] = -1e6
        loss = eager(batch(seed))
        loss.backward()
        assert torch.equal(step(batch(seed)), loss)
        for (name, reference), parameter in zip(eager.named_parameters(), program.parameters()):
            assert reference.grad is not None and parameter.grad is not None, name
            assert torch.equal(parameter.grad, reference.grad), (seed, name)
    assert torch.count_nonzero(program.moe.experts.get_parameter("w1").grad[:4]) == 0  # type: ignore[index]


def test_one_half_travels_while_the_other_computes_and_weights_wait_for_gradients_that_travel(one_of_two: None) -> None:
    after, _ = run(capture_train_step(Program(Layer(2), (batch(0),))))
    assert order_of(after) == [
        *[*SHARED * 2, *SEND * 2, *SHARED * 2],  # what comes before, the router; both halves leave; two products of three
        *[*ROUTED * 3, *SEND, *ROUTED * 3, *SEND, *SHARED],
        *[*SEND * 2, *SHARED * 6, *SHARED * 2],  # the backward: shared experts, and the router
        *[*ROUTED * 3, *SEND, *ROUTED * 3, *SEND],
        *["grouped_rows_mm_weight"] * 6,
        *SHARED,  # the weight of what came before
    ]
    nodes = list(after.module.graph.nodes)
    sent = [node for node in nodes if str(node.target) == "torchspan.all_to_all_rows.default"]
    waits = [nodes.index(next(iter(node.users))) for node in sent]
    place = [nodes.index(node) for node in sent]
    first, second, first_back, second_back = 0, 1, 2, 3
    assert place[first] < place[second] < waits[first] < place[first_back] < waits[second] < place[second_back]
    assert place[second_back] < waits[first_back] < waits[second_back]


@pytest.mark.parametrize(
    ("sizes", "options", "reason"),
    [
        ({"num_experts": 2, "num_groups": 1, "num_limited_groups": 1}, {}, "each rank has one expert; two halves need two"),
        (
            {"expert_dim": 16},
            {},
            "aten.silu.default of rows of 64 bytes gives other bits in halves; expected a multiple of 128",
        ),
        ({"expert_dim": 34}, {}, "grouped_rows_mm.default of rows of 136 bytes .* expected a multiple of 16, or exact=false"),
        ({}, {"split": False}, "split is false"),
    ],
)
def test_what_cannot_be_split_stays_whole_beside_the_shared_experts(
    one_of_two: None, sizes: dict[str, Any], options: dict[str, bool], reason: str
) -> None:
    after, decided = run(capture_train_step(Program(Layer(2, **sizes), (batch(0),))), **options)
    assert all("of 2 journeys of rows whole" in reason for reason in decided) and re.search(reason, decided[0])
    assert order_of(after)[:9] == [*SHARED * 2, *SEND, *SHARED * 2, *ROUTED * 3, *SEND]


def test_a_cpu_with_more_threads_keeps_its_bits_unless_told_otherwise(
    one_of_two: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = capture_train_step(Program(Layer(2), (batch(0),)))
    text = str(graph.module.graph)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert "gives other bits in halves with 4 threads" in run(graph)[1][0]
    assert run(graph, exact=False)[1][0].startswith("2 of 2 journeys of rows, forward and backward, in two halves")
    assert str(graph.module.graph) == text, "the graph that was given stays as it is"


def test_a_graph_without_experts_is_left_alone_and_the_report_says_so(graph: Graph) -> None:
    after, decided = run(graph)
    assert decided[0].startswith("nothing changed: no rows travel")
    assert after.count_targets() == graph.count_targets()
