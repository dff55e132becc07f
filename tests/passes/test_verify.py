"""What is checked after each pass: passes that break one thing each are refused, and the message names pass, node and thing."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import map_arg

import torchspan.parallel._all_to_all  # noqa: F401 (registers the operator)
from torchspan.core.errors import PassError
from torchspan.core.graph import Graph, InputSpec, OutputSpec
from torchspan.passes._base import Pass, PassContext, editable
from torchspan.passes._pipeline import Pipeline

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
wait = c10d.wait_tensor.default


def short(target: Any) -> str:
    """A node's name: that of its operator, without the overload."""
    return str(getattr(target, "_overloadpacket", target).__name__).rpartition(".")[2]


class Written:
    """A graph that is written by hand, each node with its example value."""

    def __init__(self, module: GraphModule | None = None) -> None:
        self.module = module or GraphModule(torch.nn.Module(), torch.fx.Graph())
        self.graph = self.module.graph
        self.mode = FakeTensorMode(shape_env=ShapeEnv(allow_dynamic_output_shape_ops=True, allow_scalar_outputs=True))

    def input(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Node:
        node = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = self.graph.create_node("call_function", target, args, kwargs, name=short(target))
        args_given, named = map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode:
            node.meta["val"] = target(*args_given, **named)
        return node

    def returns(self, *results: Node) -> Graph:
        self.graph.output(list(results))
        self.module.recompile()
        inputs = tuple(InputSpec("input", node.name) for node in self.graph.nodes if node.op == "placeholder")
        return Graph(self.module, inputs, tuple(OutputSpec("output", str(index)) for index in range(len(results))))


@dataclass(frozen=True)
class Changes(Pass):
    """Changes a copy of the graph by a function of its nodes by name."""

    name: ClassVar[str] = "changes"
    function: Callable[[Any], None] = lambda nodes: None

    def run(self, graph: Graph, context: PassContext) -> Graph:
        module = editable(graph)
        self.function({node.name: node for node in module.graph.nodes})
        module.recompile()
        return graph.with_module(module, "changes")


def change(graph: Graph, function: Callable[[dict[str, Node]], None]) -> Graph:
    return Pipeline((Changes(function),)).run(graph)


def refused(graph: Graph, function: Callable[[dict[str, Node]], None], message: str) -> None:
    change(graph, lambda nodes: None)  # the graph itself is accepted
    with pytest.raises(PassError, match=f"pass changes gave back a graph that is not valid: {message}"):
        change(graph, function)


def inserted(after: Node, target: Any, *args: Any, like: Node | None = None) -> Node:
    """A new call behind `after`, with the example value of `like`."""
    with after.graph.inserting_after(after):
        node = after.graph.create_node("call_function", target, args, name=short(target))
    if like is not None:
        node.meta["val"] = like.meta["val"]
    return node


# metadata


def arithmetic() -> Graph:
    """relu(x) @ w, and twice that."""
    g = Written()
    x, w = g.input("x", 2, 3), g.input("w", 3, 4)
    product = g.call(aten.mm.default, g.call(aten.relu.default, x), w)
    return g.returns(product, g.call(aten.mul.Tensor, product, 2))


def test_a_node_without_an_example_value_is_refused() -> None:
    def change(nodes: dict[str, Node]) -> None:
        new = inserted(nodes["relu"], aten.neg.default, nodes["relu"])
        nodes["mm"].args = (new, nodes["w"])

    refused(arithmetic(), change, r"neg \(aten.neg.default\) has no example value; give each node that a pass writes meta\[")


def test_an_example_value_of_another_shape_dtype_or_kind_is_refused() -> None:
    def wider(nodes: dict[str, Node]) -> None:
        nodes["mul"].args = (nodes["relu"], 2)

    refused(
        arithmetic(), wider, r"mul \(aten.mul.Tensor\) gives f32\[2, 3\], and its example value says f32\[2, 4\]; give each"
    )

    def integer(nodes: dict[str, Node]) -> None:
        nodes["mm"].meta["val"] = nodes["mm"].meta["val"].to(torch.bfloat16)

    refused(arithmetic(), integer, r"mm \(aten.mm.default\) gives f32\[2, 4\], and its example value says bf16\[2, 4\]")

    def none(nodes: dict[str, Node]) -> None:
        nodes["mm"].meta["val"] = None

    refused(arithmetic(), none, r"mm .* gives a tensor, and its example value is a NoneType")


def test_what_reads_a_changed_value_is_looked_at_too() -> None:
    def narrower(nodes: dict[str, Node]) -> None:
        nodes["w"].meta["val"] = nodes["w"].meta["val"][:, :2]

    refused(arithmetic(), narrower, r"mm .* gives f32\[2, 2\], and its example value says f32\[2, 4\]")


def test_a_call_that_its_operator_refuses_is_refused() -> None:
    def swapped(nodes: dict[str, Node]) -> None:
        nodes["mm"].args = (nodes["w"], nodes["relu"])

    refused(arithmetic(), swapped, r"mm \(aten.mm.default\) does not take what it is given, f32\[3, 4\], f32\[2, 3\]: ")


def test_a_graph_without_example_values_is_not_asked_for_them() -> None:
    g = arithmetic()
    for node in g.module.graph.nodes:
        node.meta.clear()
    change(g, lambda nodes: inserted(nodes["relu"], aten.neg.default, nodes["relu"]) and None)


# memory


def views() -> Graph:
    """A copy of x, its two halves' negatives, and x doubled."""
    g = Written()
    x = g.input("x", 4)
    copy = g.call(aten.clone.default, x)
    halves = [g.call(aten.slice.Tensor, copy, 0, start, start + 2) for start in (0, 2)]
    return g.returns(*halves, g.call(aten.mul.Tensor, x, 2))


def test_an_output_that_shares_memory_as_it_did_not_before_is_refused() -> None:
    def of_input(nodes: dict[str, Node]) -> None:
        nodes["clone"].replace_all_uses_with(nodes["x"])

    refused(
        views(), of_input, r"output 0, the output 0 \(slice_1\), shares memory with the input x \(x\), which it did not bef"
    )

    def of_output(nodes: dict[str, Node]) -> None:
        nodes["slice_2"].args = (nodes["clone"], 0, 1, 3)
        nodes["slice_2"].meta["val"] = nodes["clone"].meta["val"][1:3]

    refused(
        views(),
        of_output,
        r"output 0, the output 0 \(slice_1\), shares memory with output 1, the output 1 \(slice_2\), which it did not",
    )


def test_outputs_that_are_parts_of_one_buffer_are_no_harm() -> None:
    def parts(nodes: dict[str, Node]) -> None:
        nodes["slice_2"].args = (nodes["clone"], 0, 2, 3)
        nodes["slice_2"].meta["val"] = nodes["clone"].meta["val"][2:3]

    change(views(), parts)


def test_a_write_into_what_is_read_later_is_refused() -> None:
    def early(nodes: dict[str, Node]) -> None:
        inserted(nodes["relu"], aten.zero_.default, nodes["relu"], like=nodes["relu"])

    refused(
        arithmetic(),
        early,
        r"zero_ \(aten.zero_.default\) writes in place into relu, which mm \(aten.mm.default\) reads later, and read unwritten",
    )

    def late(nodes: dict[str, Node]) -> None:
        inserted(nodes["mm"], aten.zero_.default, nodes["relu"], like=nodes["relu"])

    change(arithmetic(), late)  # nothing reads it any more


def test_a_write_through_a_view_is_a_write_too() -> None:
    def through(nodes: dict[str, Node]) -> None:
        view = inserted(nodes["relu"], aten.view.default, nodes["relu"], [2, 3], like=nodes["relu"])
        inserted(view, aten.zero_.default, view, like=view)

    refused(arithmetic(), through, r"zero_ \(aten.zero_.default\) writes in place into relu, which mm")


def test_a_write_into_an_input_is_refused() -> None:
    def into(nodes: dict[str, Node]) -> None:
        inserted(nodes["mul"], aten.zero_.default, nodes["x"], like=nodes["x"])

    refused(arithmetic(), into, r"zero_ \(aten.zero_.default\) writes into the input x; expected it to write into what")


def test_a_pass_may_write_into_memory_of_its_own() -> None:
    def own(nodes: dict[str, Node]) -> None:
        buffer = inserted(nodes["relu"], aten.empty_like.default, nodes["relu"], like=nodes["relu"])
        copied = inserted(buffer, aten.copy_.default, buffer, nodes["relu"], like=buffer)
        nodes["mm"].args = (buffer, nodes["w"])
        nodes["mm"].prepend(copied)

    change(arithmetic(), own)


def test_a_read_that_moves_before_the_write_that_it_waits_for_is_refused() -> None:
    g = Written()
    x = g.input("x", 3)
    buffer = g.call(aten.clone.default, x)
    g.call(aten.add_.Tensor, buffer, 1)
    graph = g.returns(g.call(aten.neg.default, buffer))

    def moved(nodes: dict[str, Node]) -> None:
        nodes["add_"].prepend(nodes["neg"])

    refused(graph, moved, r"neg \(aten.neg.default\) reads clone before add_ \(aten.add_.Tensor\) writes into it")


# collectives


def gathered() -> Graph:
    """x gathered over two ranks, rows of it exchanged, and both again as a list of two."""
    g = Written()
    x, counts = g.input("x", 4, 3), g.input("counts", 2, dtype=torch.int64)
    whole = g.call(wait, g.call(c10d.all_gather_into_tensor.default, x, 2, "0"))
    rows = g.call(wait, g.call(torch.ops.torchspan.all_to_all_rows.default, x, counts, counts, 4, "0"))
    both = g.call(c10d.all_gather_into_tensor_coalesced.default, [x, x], 2, "0")
    several = [g.call(wait, g.call(operator.getitem, both, index)) for index in range(2)]
    return g.returns(g.call(aten.neg.default, whole), g.call(aten.neg.default, rows), *several)


@pytest.mark.parametrize("name", ["all_gather_into_tensor", "all_to_all_rows"])
def test_a_collective_is_waited_for_once(name: str) -> None:
    def never(nodes: dict[str, Node]) -> None:
        (waited,) = nodes[name].users
        other = inserted(waited, aten.clone.default, nodes["x"], like=waited)
        (reader,) = waited.users
        reader.args = (other,)
        reader.meta["val"] = other.meta["val"] = nodes["x"].meta["val"]
        waited.graph.erase_node(waited)

    def twice(nodes: dict[str, Node]) -> None:
        (waited,) = nodes[name].users
        inserted(waited, wait, nodes[name], like=waited)

    if name == "all_to_all_rows":  # gives what x has; a gathered one has twice the rows
        refused(gathered(), never, rf"the result of the collective {name} \(torchspan.{name}.default\) is never waited for;")
    refused(gathered(), twice, rf"the result of the collective {name} .* is waited for 2 times; expected one wait_tensor")


def test_each_of_several_results_is_waited_for() -> None:
    def unwaited(nodes: dict[str, Node]) -> None:
        (waited,) = nodes["getitem_1"].users
        waited.replace_all_uses_with(nodes["getitem_1"])
        waited.graph.erase_node(waited)

    refused(gathered(), unwaited, r"output \(output\) reads the collective all_gather_into_tensor_coalesced .* before any wait")


# symbols


def sized_by_data() -> Graph:
    """As many ones as x says, twice."""
    g = Written()
    size = g.call(aten.item.default, g.input("x", dtype=torch.int64))
    ones = g.call(aten.ones.default, [size])
    return g.returns(g.call(aten.mul.Tensor, ones, 2))


def test_a_size_that_nothing_finds_out_is_refused() -> None:
    def constant(nodes: dict[str, Node]) -> None:
        nodes["ones"].args = ([3],)
        nodes["ones"].graph.erase_node(nodes["item"])

    refused(sized_by_data(), constant, r"ones \(aten.ones.default\) has the size u0, which depends on data, and nothing before")
