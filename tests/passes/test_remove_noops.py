"""No-ops: what is removed and what stays; results are compared with those of the graph as it was, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from torchspan.core.errors import PassError
from torchspan.core.graph import Graph, InputSpec, OutputSpec, output_node
from torchspan.core.program import Program
from torchspan.passes._base import PassContext, editable
from torchspan.passes._pipeline import Pipeline
from torchspan.passes.remove_noops import RemoveNoops

aten = torch.ops.aten
X = torch.arange(-6.0, 6.0).reshape(3, 4)


def _graph(function: Callable[[Tensor], Any]) -> Graph:
    """The graph of a function of X, which gives one tensor or several."""
    module = make_fx(function, tracing_mode="fake")(X)
    value = output_node(module.graph).args[0]
    num = len(value) if isinstance(value, (tuple, list)) else 1
    return Graph(module, (InputSpec("input", "x"),), tuple(OutputSpec("output", f"y{i}") for i in range(num)))


def _removed(graph: Graph) -> dict[str, int]:
    """What the pass removes, after the results were compared."""
    after = Pipeline((RemoveNoops(),)).run(graph)
    before, result = graph.module(X.clone()), after.module(X.clone())
    for actual, other in zip(*(value if isinstance(value, (tuple, list)) else [value] for value in (before, result))):
        assert torch.equal(actual, other) and torch.equal(actual.signbit(), other.signbit())
        assert (actual.dtype, actual.stride()) == (other.dtype, other.stride())
    removed = graph.count_targets() - after.count_targets()
    return {name.removeprefix("aten.").split(".")[0]: count for name, count in removed.items()}


NOOPS: dict[str, tuple[Callable[[Tensor], Any], dict[str, int]]] = {
    "a view of the same shape": (lambda x: aten.view(x.exp(), [3, 4]).sin(), {"view": 1}),
    "an expand to the same shape": (lambda x: aten.expand(x.exp(), [3, 4]).sin(), {"expand": 1}),
    "a slice of all": (lambda x: aten.slice(x.exp(), 1, 0, 4).sin(), {"slice": 1}),
    "two transposes": (lambda x: aten.t(aten.t(x.exp())).sin(), {"t": 2}),
    "three permutations": (
        lambda x: aten.permute(aten.permute(aten.permute(x.view(1, 3, 4).exp(), [1, 2, 0]), [1, 2, 0]), [1, 2, 0]).sin(),
        {"permute": 3},
    ),
    "a transpose that others read": (lambda x: [(t := aten.t(x.exp())).sin(), aten.t(t).cos()], {"t": 1}),
    "a copy": (lambda x: x.exp().clone().sin(), {"clone": 1}),
    "a conversion to what it is": (lambda x: aten._to_copy(x.exp(), dtype=torch.float32).sin(), {"_to_copy": 1}),
    "a copy that is given, of what is not": (lambda x: x.exp().clone(), {"clone": 1}),
}


@pytest.mark.parametrize("name", NOOPS)
def test_what_changes_nothing_is_removed(name: str) -> None:
    function, expected = NOOPS[name]
    assert _removed(_graph(function)) == expected


SEEN: dict[str, Callable[[Tensor], Any]] = {
    "another shape": lambda x: x.exp().view(4, 3).sin(),
    "a transpose": lambda x: aten.t(x.exp()).sin(),
    "a slice of a part": lambda x: aten.slice(x.exp(), 1, 0, 3).sin(),
    "another dtype": lambda x: x.exp().double().sin(),
    "the same bits as numbers of another kind": lambda x: aten.bitwise_not(aten.view.dtype(x.exp(), torch.int32)),
    "other strides": lambda x: aten.t(x.exp()).clone(memory_format=torch.contiguous_format) @ x,
    "a copy of an input that is given": lambda x: x.clone(),
    "a copy of an input that is read": lambda x: x.clone() @ x.t(),
    "a copy that is given beside what it copies": lambda x: [(y := x.exp()), y.clone()],
    "two copies that are given": lambda x: [(y := x.exp().sin()).view(12), y.clone().view(2, 6)],
    "a copy of what begins inside": lambda x: x.exp()[1:].clone() @ x.t(),
    "a zero that is added": lambda x: (x * -0.0) + 0,
}


@pytest.mark.parametrize("name", SEEN)
def test_what_can_be_seen_stays(name: str) -> None:
    removed = _removed(_graph(SEEN[name]))
    removed.pop("detach", None)  # which a trace may put beside a view as another dtype
    assert removed == {}


def test_of_two_copies_that_are_given_one_is_enough_to_be_kept_apart() -> None:
    assert _removed(_graph(lambda x: [(y := x.exp()).clone(), y.clone()])) == {"clone": 1}


def test_a_wait_for_no_collective_is_removed_and_one_for_a_collective_stays(sharded: Any) -> None:
    graph = sharded(8, 1)
    module = editable(graph)
    wait = torch.ops._c10d_functional.wait_tensor.default
    computed = next(node for node in module.graph.nodes if node.target is aten.mul.Tensor)
    waited = next(node for node in module.graph.nodes if node.target is wait)
    for node in (computed, waited):
        with module.graph.inserting_after(node):
            again = module.graph.call_function(wait, (node,))
        again.meta = dict(node.meta)
        node.replace_all_uses_with(again, delete_user_cb=lambda user, again=again: user is not again)
    module.recompile()
    after = Pipeline((RemoveNoops(),)).run(graph.with_module(module, "waits"))
    assert after.count_targets()[str(wait)] == graph.count_targets()[str(wait)]


def test_a_training_step_gives_the_same_bits_with_fewer_nodes(program: Program, graph: Graph) -> None:
    context = PassContext()
    after = Pipeline((RemoveNoops(),)).run(graph, context)
    assert isinstance(program.target, torch.nn.Module)
    arguments = [*program.target.parameters(), *program.target.buffers(), *program.args]
    with torch.no_grad():
        for actual, other in zip(graph.module(*arguments), after.module(*arguments), strict=True):
            assert torch.equal(actual, other)
    removed = len(graph.module.graph.nodes) - len(after.module.graph.nodes)
    (decision,) = context.report.decisions
    assert decision.choice.startswith("removed ") and removed > 10
    assert sum(int(word) for word in decision.choice.split() if word.isdigit()) == removed


def test_a_graph_without_no_ops_is_left_as_it_is() -> None:
    context = PassContext()
    Pipeline((RemoveNoops(),)).run(_graph(lambda x: x.exp().sin()), context)
    assert [decision.choice for decision in context.report.decisions] == ["nothing changed"]


def test_outputs_that_would_share_memory_do_not_pass() -> None:
    before = _graph(lambda x: [(y := x.exp()), y.clone()])
    module = editable(before)
    output = output_node(module.graph)
    output.args = ([output.args[0][0]] * 2,)
    with pytest.raises(PassError, match=r"made outputs share memory: output 0 \(output y0\) and output 1 \(output y1\)"):
        RemoveNoops().ensure(before, replace(before, module=module))
