"""A pass that a program sets sees the joint graph before it is partitioned, and what it returns is compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.environment.scope import Environment

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")

BACKPORT = REGISTRY.get("joint_custom_pass").BACKPORT


def config() -> Any:
    import torch._functorch.config as module

    return module


def program(x: Tensor) -> Tensor:
    return x.sin() * 2


def cosines_for_sines(graph: GraphModule, joint_inputs: Any) -> GraphModule:
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default):
        node.target = torch.ops.aten.cos.default
    graph.recompile()
    return graph


def test_what_the_pass_returns_is_compiled(environment: Environment) -> None:
    x = torch.linspace(0, 1, 5, requires_grad=True)
    with config().patch("joint_custom_pass", cosines_for_sines):
        y = torch.compile(program, backend="aot_eager")(x)
    torch.testing.assert_close(y, x.cos() * 2)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], x.cos() * 2)  # the backward as autograd wrote it
    assert config().joint_custom_pass is None
    if is_lacking(BACKPORT):
        assert [decision.choice for decision in environment.report.decisions] == ["torchspan's joint_custom_pass"]


def test_the_pass_is_given_one_graph_of_forward_and_backward_and_its_inputs(environment: Environment) -> None:
    graphs: list[Any] = []

    def look(graph: GraphModule, joint_inputs: Any) -> GraphModule:
        placeholders = [node.name for node in graph.graph.find_nodes(op="placeholder")]
        targets = [str(node.target) for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.cos.default)]
        graphs.append((placeholders, targets, [len(part) for part in joint_inputs]))
        return graph

    x = torch.ones(3, requires_grad=True)
    with config().patch("joint_custom_pass", look):
        torch.compile(program, backend="aot_eager")(x).sum().backward()
        with torch.no_grad():
            torch.compile(program, backend="aot_eager")(x)
    assert graphs == [(["primals_1", "tangents_1"], ["aten.cos.default"], [1, 1])]


def test_what_the_pass_says_of_recomputation_holds(environment: Environment) -> None:
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch.utils.checkpoint import CheckpointPolicy

    def recompute(policy: CheckpointPolicy) -> Any:
        def tag(graph: GraphModule, joint_inputs: Any) -> GraphModule:
            for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
                node.meta["recompute"], node.meta["ac_graph_id"] = policy, 0
            return graph

        return tag

    def matrix_products_of_backward(policy: CheckpointPolicy) -> int:
        results: list[int] = []

        def count(graph: GraphModule, inputs: Any) -> Any:
            results.append(len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)))
            return make_boxed_func(graph)

        backend = aot_autograd(
            fw_compiler=lambda graph, inputs: make_boxed_func(graph),
            bw_compiler=count,
            partition_fn=min_cut_rematerialization_partition,
        )
        torch._dynamo.reset()
        x, w = (torch.ones(4, 4, requires_grad=True) for _ in range(2))
        with config().patch("joint_custom_pass", recompute(policy)):
            torch.compile(lambda x, w: (x @ w).sin().sum(), backend=backend)(x, w).backward()
        return results[0]

    saved, recomputed = map(matrix_products_of_backward, (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE))
    assert recomputed == saved + 1


def test_the_option_can_be_set_and_others_cannot(environment: Environment) -> None:
    with pytest.raises(AttributeError):
        config().no_such_option = 1
    config().joint_custom_pass = cosines_for_sines
    try:
        assert config().joint_custom_pass is cosines_for_sines
        assert isinstance(config().save_config(), bytes)  # a function is not saved
    finally:
        config().joint_custom_pass = None


@pytest.mark.slow
def test_a_program_that_is_in_the_cache_is_compiled_anew_with_a_pass(
    environment: Environment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not is_lacking(BACKPORT):
        pytest.skip("torch's own takes the program without the pass from its cache")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))

    def product(x: Tensor, w: Tensor) -> Tensor:
        return x @ w

    def doubled(graph: GraphModule, joint_inputs: Any) -> GraphModule:
        (node,) = graph.graph.find_nodes(op="output")
        product_ = node.args[0][0]
        with graph.graph.inserting_before(node):
            twice = graph.graph.call_function(torch.ops.aten.mm.default, (product_, graph_input(graph, 1)))
        twice.meta.update(product_.meta)
        node.args = ([twice, *node.args[0][1:]],)
        graph.recompile()
        return graph

    def graph_input(graph: GraphModule, position: int) -> Any:
        return graph.graph.find_nodes(op="placeholder")[position]

    x, w = (torch.full((4, 4), 0.5, requires_grad=True) for _ in range(2))
    for custom_pass, expected in ((None, x @ w), (doubled, x @ w @ w), (None, x @ w)):
        torch._dynamo.reset()
        with config().patch({"joint_custom_pass": custom_pass}):
            torch.testing.assert_close(torch.compile(product)(x, w), expected)
