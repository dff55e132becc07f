"""Cutting a graph into regions: convex, of one annotation, free of circles, and the same numbers."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable

import pytest
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from torchspan.core.errors import GraphError
from torchspan.core.regions import cut_regions, list_regions, replace_region

KEY = "compile_with_inductor"


def annotate(gm: GraphModule, name_of: Callable[[Node], object]) -> GraphModule:
    """Annotate each call with what `name_of` says, where that is not None."""
    for node in gm.graph.nodes:
        name = name_of(node)
        if name is not None and node.op.startswith("call_"):
            node.meta["custom"] = {KEY: name}
    return gm


def traced(function: Callable[..., object], *args: object, mode: str = "fake") -> GraphModule:
    return make_fx(function, tracing_mode=mode)(*args)


def random_graph(seed: int, num_nodes: int = 40) -> GraphModule:
    """A graph of additions and products with random edges and random annotations."""
    chance, graph = random.Random(seed), Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(3)]
    for _ in range(num_nodes):
        target = chance.choice([torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor, torch.ops.aten.sub.Tensor])
        node = graph.call_function(target, (chance.choice(nodes[-12:]), chance.choice(nodes[-12:])))
        name = chance.choice([None, None, "a", "b"])
        if name:
            node.meta["custom"] = {KEY: name}
        nodes.append(node)
    graph.output(tuple(nodes[-6:]))
    graph.eliminate_dead_code()
    return GraphModule({}, graph)


@pytest.mark.parametrize("seed", range(25))
def test_any_graph_is_cut_without_circles_and_computes_the_same(seed: int) -> None:
    gm = random_graph(seed)
    text = str(gm.graph)
    inputs = [torch.randn(4, dtype=torch.float64) / 2 for _ in range(3)]
    cut = cut_regions(gm)
    for actual, expected in zip(cut(*inputs), gm(*inputs), strict=True):
        assert torch.equal(actual, expected)
    annotated = [node for node in gm.graph.nodes if "custom" in node.meta]
    inside = [node for region in list_regions(cut) for node in region.module.graph.nodes if node.op == "call_function"]
    assert len(inside) == len(annotated)
    for region in list_regions(cut):
        names = {node.meta["custom"][KEY] for node in region.module.graph.nodes if node.op == "call_function"}
        assert names == {region.name}
    assert str(gm.graph) == text, "the graph that was given was changed"


def test_two_kinds_of_regions_that_would_wait_for_each_other_are_split() -> None:
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    add = torch.ops.aten.add.Tensor
    a1, b2 = graph.call_function(add, (x, 1)), graph.call_function(add, (y, 2))
    b1, a2 = graph.call_function(add, (a1, 3)), graph.call_function(add, (b2, 4))
    for node, name in ((a1, "a"), (a2, "a"), (b1, "b"), (b2, "b")):
        node.meta["custom"] = {KEY: name}
    graph.output((b1, a2))
    cut = cut_regions(GraphModule({}, graph))
    assert len(list_regions(cut)) == 3
    assert cut(torch.zeros(1), torch.zeros(1)) == (torch.tensor([4.0]), torch.tensor([6.0]))


def test_one_region_a_name_in_a_chain_and_equal_names_apart_are_apart() -> None:
    def chain(x):
        return ((x.sin().cos() + 1).exp().sin() * 2).cos().tanh()

    gm = traced(chain, torch.ones(3))
    names = {"sin": "a", "cos": "a", "exp": "b", "sin_1": "a", "cos_1": "b", "tanh": "a"}
    cut = cut_regions(annotate(gm, lambda node: names.get(node.name)))
    regions = list_regions(cut)
    assert [region.name for region in regions] == ["a", "b", "a", "b", "a"]
    assert [region.target for region in regions] == [f"region_{i}_{region.name}" for i, region in enumerate(regions)]
    assert torch.equal(cut(torch.ones(3)), chain(torch.ones(3)))


def test_an_independent_node_between_does_not_split_a_region() -> None:
    def program(x, y):
        a = x.sin()
        b = y.exp()
        return (a * b).cos()

    gm = annotate(traced(program, torch.ones(3), torch.ones(3)), lambda node: None if node.name == "exp" else "a")
    (region,) = list_regions(cut_regions(gm))
    assert len(region.call.args) == 2


def test_outputs_of_one_node_stay_with_it() -> None:
    def program(x):
        values, indices = x.topk(2)
        return values + 1, indices + 1

    gm = annotate(traced(program, torch.arange(6.0)), lambda node: "a" if node.name == "topk" else None)
    cut = cut_regions(gm)
    (region,) = list_regions(cut)
    assert [node.target for node in region.module.graph.nodes if node.op == "call_function"][1:] == [operator.getitem] * 2
    assert all(isinstance(value, torch.Tensor) for value in region.call.meta["val"])
    for actual, expected in zip(cut(torch.arange(6.0)), program(torch.arange(6.0)), strict=True):
        assert torch.equal(actual, expected)


def test_an_unpacked_output_that_is_annotated_alone_stays_outside() -> None:
    gm = traced(lambda x: x.topk(2)[0] + 1, torch.arange(6.0))
    cut = cut_regions(annotate(gm, lambda node: None if node.name == "topk" else "a"))
    (region,) = list_regions(cut)
    assert all(isinstance(value, torch.Tensor) for value in region.example_inputs())


def test_symbolic_sizes_are_inputs_of_a_region_and_have_example_values() -> None:
    def program(x, y):
        return x.reshape(-1) + torch.arange(y.shape[0] * 2)

    gm = traced(program, torch.ones(4, 2), torch.ones(4, 3), mode="symbolic")
    cut = cut_regions(annotate(gm, lambda node: None if "sym_size" in node.name or node.name.startswith("mul") else "a"))
    (region,) = list_regions(cut)
    assert any(isinstance(value, torch.SymInt) for value in region.example_inputs())
    assert torch.equal(cut(torch.ones(6, 2), torch.ones(6, 3)), program(torch.ones(6, 2), torch.ones(6, 3)))


def test_a_constant_is_an_input_and_a_subgraph_is_part_of_the_region() -> None:
    constant = torch.tensor([1.0, 2.0])
    gm = make_fx(lambda x: x * constant + 1)(torch.ones(2))
    (attribute,) = [node for node in gm.graph.nodes if node.op == "get_attr"]
    attribute.meta.pop("val", None)
    cut = cut_regions(annotate(gm, lambda node: "a"))
    (region,) = list_regions(cut)
    assert torch.equal(region.example_inputs()[1], constant)
    assert torch.equal(cut(torch.ones(2)), torch.tensor([2.0, 3.0]))

    def branches(x):
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,)) + 1

    gm = annotate(make_fx(branches)(torch.ones(2)), lambda node: "b" if node.name == "cond" else None)
    cut = cut_regions(gm)
    (region,) = list_regions(cut)
    assert all(isinstance(value, torch.Tensor) for value in region.example_inputs())
    assert torch.equal(cut(-torch.ones(2)), branches(-torch.ones(2)))
    assert not any(node.op == "get_attr" for node in cut.graph.nodes)


def test_no_read_moves_past_an_in_place_change() -> None:
    def program(x):
        early = x.sin()
        x.copy_(early)
        return early + x.cos()

    gm = annotate(make_fx(program)(torch.ones(2)), lambda node: "a")
    cut = cut_regions(gm)
    assert [node.target for node in cut.graph.nodes if node.op == "call_function" and "copy_" in str(node.target)]
    mine, theirs = torch.full((2,), 0.5), torch.full((2,), 0.5)
    assert torch.equal(cut(mine), program(theirs)) and torch.equal(mine, theirs)
    assert len(list_regions(cut)) == 2


def test_a_replaced_region_is_what_the_graph_calls() -> None:
    gm = annotate(traced(lambda x: (x + 1).sin() * 2, torch.ones(2)), lambda node: "a" if node.name == "sin" else None)
    cut = cut_regions(gm)
    (region,) = list_regions(cut)
    calls: list[int] = []

    def compiled(x: torch.Tensor) -> tuple[torch.Tensor]:
        calls.append(1)
        return (x.sin(),)

    replace_region(cut, region, compiled)
    assert torch.equal(cut(torch.ones(2)), (torch.ones(2) + 1).sin() * 2) and calls == [1]
    assert list_regions(cut) == []


def test_an_input_of_unknown_shape_is_named() -> None:
    gm = annotate(torch.fx.symbolic_trace(lambda x: x + 1), lambda node: "a")
    (region,) = list_regions(cut_regions(gm))
    with pytest.raises(GraphError, match=r"x \(placeholder x\) goes into a region and has no meta\['val'\]"):
        region.example_inputs()


def test_a_graph_without_annotations_keeps_its_nodes() -> None:
    gm = traced(lambda x: x.sin() + 1, torch.ones(2))
    assert [node.target for node in cut_regions(gm).graph.nodes] == [node.target for node in gm.graph.nodes]
