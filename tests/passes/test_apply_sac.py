"""Selective activation checkpointing: eager's bits, with as many bytes held for the backward as was predicted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchspan.capture._state import BoundGraph
from torchspan.capture.joint import capture_joint, is_supported
from torchspan.capture.train_step import capture_train_step
from torchspan.core.errors import InputError, PassError
from torchspan.core.graph import Graph
from torchspan.core.program import Program
from torchspan.core.report import Report
from torchspan.models._base import get_model
from torchspan.passes._base import PassContext
from torchspan.passes._phases import phases_of
from torchspan.passes._pipeline import Pipeline
from torchspan.passes._storages import kept_for_backward
from torchspan.passes.apply_sac import ApplySAC
from torchspan.train.job import Loss

CAPTURES = [capture_train_step, capture_joint] if is_supported() else [capture_train_step]
POLICIES = ['apply_sac{save=""}', "apply_sac", "apply_sac{budget=0.5}"]


def step_of(model: str) -> Program:
    spec, draw = get_model(model), torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(256, (2, 32), generator=draw) for _ in range(2))
    return Program(Loss(spec.build(spec.flavour("tiny")).init_weights(0), 64), (tokens, labels))  # type: ignore[operator]


@cache
def captured(model: str, capture: Any) -> Graph:
    """The step of a model; a pass leaves the graph that it is given as it is."""
    return capture(step_of(model))  # type: ignore[no-any-return]


@pytest.fixture
def graph() -> Graph:
    return captured("llama3", capture_train_step)


def run(text: str, graph: Graph, **context: Any) -> tuple[Graph, Report]:
    report = Report()
    return Pipeline.parse(text).run(graph, PassContext(report, **context)), report


def differing(program: Program, graph: Graph, eager: nn.Module) -> list[str]:
    """What is not equal in every bit after one step of both."""
    loss, ours = eager(*program.args), BoundGraph(graph, program.target)(*program.args)
    loss.backward()
    names = [] if torch.equal(loss, ours) else ["loss"]
    module = program.target
    names += [
        n
        for (n, actual), other in zip(eager.named_parameters(), module.parameters())
        if not torch.equal(actual.grad, other.grad)
    ]
    return names + [n for (n, actual), other in zip(eager.named_buffers(), module.buffers()) if not torch.equal(actual, other)]


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("model", ["llama3", "deepseek_v3"])
def test_as_many_bytes_are_held_as_predicted_and_every_bit_is_eagers(model: str, capture: Any, measured: Any) -> None:
    graph, program = captured(model, capture), step_of(model)
    held, peak = measured(graph, program)
    for policy in POLICIES[: 3 if model == "llama3" else 1]:
        after, report = run(policy, graph)
        held_after, peak_after = measured(after, program)
        assert report.figures["sac_kept_before_bytes"] == pytest.approx(held, rel=0.02)
        assert report.figures["sac_kept_after_bytes"] == pytest.approx(held_after, rel=0.02), policy
        assert held_after < 0.75 * held and peak_after < 0.9 * peak, policy
        assert differing(step_of(model), after, step_of(model).target) == [], policy


def test_recomputing_all_keeps_what_blocks_are_given_and_no_less(graph: Graph) -> None:
    after, report = run('apply_sac{save=""}', graph)
    nodes_kept = kept_for_backward(after.module.graph, phases_of(after.module.graph))
    within = [node for node in nodes_kept if node.meta["custom"]["module"].startswith("model.layers.")]
    # the sum that ends each of the two blocks
    assert [node.meta["custom"]["module"] for node in within] == ["model.layers.0", "model.layers.1"]
    (decision,) = report.decisions
    assert "kept for the backward" in decision.choice and "nodes recomputed" in decision.choice


def test_what_is_recomputed_stands_right_before_its_first_reader_and_is_computed_once(graph: Graph) -> None:
    after, _ = run('apply_sac{save=""}', graph)
    nodes = list(after.module.graph.nodes)
    again = [node for node in nodes if "recomputed" in (node.meta.get("custom") or {})]
    assert len({node.name for node in again}) == len(again) > 40
    place = {node: index for index, node in enumerate(nodes)}
    for node in again:
        first = min(map(place.__getitem__, node.users))
        assert all(node_again in again for node_again in nodes[place[node] + 1 : first]), node.name
    assert after.count_targets()["aten.silu.default"] == 2 * graph.count_targets()["aten.silu.default"]


def test_operators_that_are_saved_run_once_and_exceptions_twice(graph: Graph) -> None:
    def num_products(text: str) -> int:
        return run(text, graph)[0].count_targets()["aten.mm.default"]

    before = graph.count_targets()["aten.mm.default"]
    assert num_products("apply_sac") == before
    assert num_products("apply_sac{recompute=mm}") == num_products('apply_sac{save=""}') == before + 12
    assert num_products("apply_sac{save=aten.mm.*}") == before


def test_modules_and_every_say_where_it_works(graph: Graph) -> None:
    def paths(text: str) -> set[str]:
        nodes = run(text, graph)[0].module.graph.nodes
        return {node.meta["custom"]["module"] for node in nodes if "recomputed" in (node.meta.get("custom") or {})}

    parts = {".".join(path.split(".")[:4]) for path in paths("apply_sac{modules=*.feed_forward}")}
    assert parts == {"model.layers.0.feed_forward", "model.layers.1.feed_forward"}
    assert all(path.startswith("model.layers.1") for path in paths('apply_sac{every=2,save=""}'))


def test_a_larger_budget_recomputes_less_and_keeps_within_it(graph: Graph) -> None:
    bytes_kept, costs = [], []
    for budget in ("0", "0.4", "0.6", "0.8", "1"):
        after, report = run(f"apply_sac{{budget={budget}}}", graph)
        bytes_kept.append(report.figures["sac_kept_after_bytes"])
        costs.append(len(after.module.graph.nodes) - len(graph.module.graph.nodes))
        if float(budget):
            assert bytes_kept[-1] <= float(budget) * report.figures["sac_kept_before_bytes"]
    assert bytes_kept == sorted(bytes_kept) and costs == sorted(costs, reverse=True) and costs[-1] == 0 < costs[0]
    assert bytes_kept[-1] > 0.95 * report.figures["sac_kept_before_bytes"]


def test_a_budget_may_be_bytes_and_one_that_cannot_be_kept_is_told(graph: Graph) -> None:
    _, report = run("apply_sac{budget=160KB}", graph)
    assert 140_000 < report.figures["sac_kept_after_bytes"] <= 160_000
    _, report = run("apply_sac{budget=1KB}", graph)
    assert report.decisions[-1].choice == "budget not reached" and "the budget is 1000" in report.decisions[-1].reason
    with pytest.raises(PassError, match=r"cannot keep to its budget.*raise it"):
        run("apply_sac{budget=1KB}", graph, strict=True)


def test_a_part_that_would_keep_more_than_it_computes_is_left_as_it_is(graph: Graph) -> None:
    # a product's input is kept anyway, and its result is read by others: nothing is gained by making it again
    after, report = run("apply_sac{modules=*.wq,save=none}", graph)
    assert after.module.code == graph.module.code and report.decisions[0].choice == "nothing changed"

    class Summing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(64, 2)])

        def forward(self, x: Tensor) -> Tensor:
            return (x * 2).sin().sum() + self.layers[0](x.relu()).sigmoid().sum()

    wide = capture_train_step(Program(Summing(), (torch.ones(4, 64),)))
    assert run("apply_sac{save=none}", wide)[0].count_targets() == wide.count_targets()


def test_the_choice_is_the_same_each_time(graph: Graph) -> None:
    first, second = (run("apply_sac{budget=0.5}", graph)[0].module.code for _ in range(2))
    assert first == second


class Block(nn.Module):
    """A block that draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x).exp().sigmoid(), 0.5).tanh()


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().sum()


def test_random_numbers_are_drawn_once() -> None:
    torch.manual_seed(0)
    module, x = Dropping(), torch.randn(4, 8)
    program = Program(module, (x,))
    graph = capture_train_step(program)
    after, _ = run('apply_sac{save=""}', graph)
    drawn = {name: number for name, number in graph.count_targets().items() if "dropout" in name or "bernoulli" in name}
    assert drawn and {name: after.count_targets()[name] for name in drawn} == drawn
    assert len(after.module.graph.nodes) > len(graph.module.graph.nodes)
    gradients = []
    for each_graph in (graph, after):
        torch.manual_seed(5)
        BoundGraph(each_graph, module)(x)
        gradients.append([parameter.grad for parameter in module.parameters()])
    assert all(torch.equal(actual, other) for actual, other in zip(*gradients))


def test_collectives_run_once_unless_asked_and_parameters_are_gathered_once_even_then(sharded: Callable[..., Graph]) -> None:
    graph = sharded(dp_shard=4, tp=2)
    before = graph.num_collectives()
    assert run('apply_sac{save=""}', graph)[0].num_collectives() == before
    after = run('apply_sac{save="",collectives=true}', graph)[0]
    more = after.num_collectives() - before
    # what tensor parallelism gathers before attention and before the feed-forward of each of two blocks
    assert (
        set(more) <= {"all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"} and more["all_gather_into_tensor"] == 4
    )


def test_counts_of_tokens_are_computed_once() -> None:
    graph = captured("deepseek_v3", capture_train_step)
    after, _ = run('apply_sac{save=""}', graph)
    # a balance is moved by the sign of what is missing: in the forward alone
    assert after.count_targets()["aten.sign.default"] == graph.count_targets()["aten.sign.default"] == 2
    assert after.count_targets()["aten.topk.default"] > graph.count_targets()["aten.topk.default"]
    assert run("apply_sac", graph)[0].count_targets()["aten.topk.default"] == graph.count_targets()["aten.topk.default"]


def test_a_graph_without_blocks_says_that_nothing_changed() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).exp().sum()

    graph = capture_train_step(Program(Plain(), (torch.ones(2, 4),)))
    after, report = run("apply_sac", graph)
    assert after.module.code == graph.module.code
    assert report.decisions[0].choice == "nothing changed" and "there is no block" in report.decisions[0].reason


def test_values_on_the_cpu_are_not_offloaded_and_this_is_told(graph: Graph) -> None:
    after, report = run("apply_sac{offload=mm}", graph)
    assert "on the CPU already" in report.decisions[0].reason and after.count_targets()["torchspan.copy_to_host.default"] == 0
    with pytest.raises(PassError, match=r"cannot offload.*leave offload out"):
        run("apply_sac{offload=mm}", graph, strict=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("budget=0.5,save=mm", "two ways to choose; give one"),
        ("budget=1.5", "expected a share from 0 to 1, or bytes such as 2GiB"),
        ("budget=much", "'much' is no size in bytes"),
        ("every=0", "expected 1 or more"),
    ],
)
def test_options_that_cannot_be_are_refused(options: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Pipeline.parse(f"apply_sac{{{options}}}")


def test_a_graph_that_keeps_more_than_before_is_refused(graph: Graph) -> None:
    after, _ = run('apply_sac{save=""}', graph)
    with pytest.raises(PassError, match=r"bytes for the backward.*expected no more"):
        ApplySAC().ensure(after, replace(graph, notes=after.notes))
