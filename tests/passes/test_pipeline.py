"""Pipelines: text, order, what is checked after each pass, and what is told of a mistake."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from torchspan.core.collectives import reorder
from torchspan.core.errors import GraphError, InputError, PassError, UnknownNameError
from torchspan.core.graph import Graph
from torchspan.core.program import Program
from torchspan.core.report import Report
from torchspan.passes import describe_passes
from torchspan.passes._base import REGISTRY, STAGES, Pass, PassContext, editable
from torchspan.passes._instruments import Counts, Dump, Timing
from torchspan.passes._pipeline import Pipeline, default_of, verify_result
from torchspan.passes.regional_inductor import RegionalInductor
from torchspan.passes.transformer_block_bucketing import TransformerBlockBucketing


def _as_it_is(module: torch.fx.GraphModule, inputs: Any, name: str) -> Any:
    """A backend that compiles nothing."""
    return module


@pytest.mark.parametrize("name", REGISTRY.names())
def test_every_pass_is_a_frozen_dataclass_with_defaults_and_can_be_written_as_text(name: str) -> None:
    kind = REGISTRY.get(name).PASS
    assert issubclass(kind, Pass) and is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert kind.name == name and kind.summary
    (written,) = Pipeline.parse(name).passes
    assert written == kind() and str(written) == name
    for option in fields(kind):
        text = f"{name}{{{option.name}={_another(default_of(option))!r}}}"
        try:
            (changed,) = Pipeline.parse(text).passes
        except InputError:  # an option that takes some values only; its own tests say which
            continue
        assert Pipeline.parse(str(changed)).passes == (changed,) != (written,)


def _another(value: Any) -> Any:
    return {bool: lambda: not value, str: lambda: "a,b|c", int: lambda: value + 1, float: lambda: value + 0.5}[type(value)]()


@pytest.mark.parametrize("name", REGISTRY.names())
def test_every_pass_leaves_the_graph_it_is_given_as_it_is_and_keeps_its_claim_of_the_numbers(
    name: str, graph: Graph, program: Program, tokens: Any
) -> None:
    code = graph.module.code
    after = Pipeline.parse(name).run(graph, PassContext(compile_region=_as_it_is))
    assert graph.module.code == code and graph.notes == () and after.notes == (name,)
    state = [*program.state().values()]
    before, result = graph.module(*state, *tokens), after.module(*state, *tokens)
    tolerance = REGISTRY.get(name).PASS.tolerance
    for actual, other in zip(before, result):
        assert torch.equal(actual, other) or (actual - other).abs().max() <= tolerance * actual.abs().max()


@pytest.mark.parametrize("name", REGISTRY.names())
def test_every_pass_gives_a_valid_graph_of_a_sharded_step(name: str, sharded: Any) -> None:
    graph = sharded()
    if name == "full_inductor_compilation" and torch.__version__ < "2.9":
        pytest.skip("torch 2.8 is refused it: tests/passes/test_full_inductor_compilation.py")
    after = Pipeline.parse(name).run(graph, PassContext(compile_region=_as_it_is))
    assert (after.inputs, after.outputs) == (graph.inputs, graph.outputs)


def test_passes_run_in_the_order_written_and_are_watched(sharded: Any, tmp_path: Path) -> None:
    report, counts = Report(), Counts()
    pipeline = Pipeline.parse("transformer_block_bucketing, regional_inductor{modules='*.feed_forward'}")
    after = pipeline.run(sharded(), PassContext(report, _as_it_is), [Timing(report), counts, Dump(tmp_path)])
    assert after.notes == ("transformer_block_bucketing", "regional_inductor{modules='*.feed_forward'}")
    assert [row[0] for row in counts.rows] == ["transformer_block_bucketing", "regional_inductor"]
    assert counts.rows[0][2]["all_gather_into_tensor"] < counts.rows[0][1]["all_gather_into_tensor"]
    assert report.figures["pass_regional_inductor_s"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00_captured.py",
        "01_transformer_block_bucketing.py",
        "02_regional_inductor.py",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("transformer_block_bucket", "no pass 'transformer_block_bucket'; did you mean 'transformer_block_bucketing'?"),
        ("regional_inductor{module='x'}", "no option of pass 'regional_inductor' 'module'; did you mean 'modules'?"),
        (
            "transformer_block_bucketing{gather=3}",
            "option 'gather' of pass 'transformer_block_bucketing' is '3'; expected true or",
        ),
        ("transformer_block_bucketing{gather=true,gather=true}", "option 'gather' of pass .* is given twice"),
        (
            "regional_inductor{modules}",
            r"cannot read 'modules' in the options of pass 'regional_inductor'; expected option=value",
        ),
        ("regional_inductor{", r"cannot read 'regional_inductor\{' in the pipeline"),
        (",regional_inductor", "cannot read ',regional_inductor' in the pipeline"),
    ],
)
def test_a_mistake_in_the_text_is_told(text: str, message: str) -> None:
    with pytest.raises((InputError, UnknownNameError), match=message):
        Pipeline.parse(text)


@dataclass(frozen=True)
class _Late(Pass):
    name: ClassVar[str] = "late"
    stage: ClassVar[Any] = "communication"
    conflicts: ClassVar[tuple[str, ...]] = ("other",)
    after: ClassVar[tuple[str, ...]] = ("transformer_block_bucketing",)


@dataclass(frozen=True)
class _Other(Pass):
    name: ClassVar[str] = "other"


def test_passes_declare_what_they_stand_after_and_beside() -> None:
    bucketing, late = TransformerBlockBucketing(), _Late()
    assert str(Pipeline((bucketing, late, RegionalInductor()))) == "transformer_block_bucketing,late,regional_inductor"
    with pytest.raises(
        InputError, match="'late' works on what transformer_block_bucketing gives; write transformer_block_buck"
    ):
        Pipeline((late, bucketing))
    with pytest.raises(InputError, match="and so comes after what changes how ranks talk; write late,regional_inductor"):
        Pipeline((RegionalInductor(), late))
    with pytest.raises(InputError, match="passes 'other' and 'late' do the same work in two ways; expected one of them"):
        Pipeline((_Other(), late))


def test_an_empty_pipeline_changes_nothing(graph: Graph) -> None:
    assert Pipeline.parse(" ").run(graph) is graph and str(Pipeline.parse("")) == ""


def test_the_listing_has_every_pass_with_its_options() -> None:
    rows = {row["name"]: row for row in describe_passes()}
    assert sorted(rows) == REGISTRY.names()
    stages = [row["stage"] for row in rows.values()]
    assert stages == sorted(stages, key=(None, *STAGES).index)
    assert all(row["claim"].startswith(("bitwise", "within ")) for row in rows.values())
    assert {name for row in rows.values() for name in (*row["conflicts"], *row["after"])} <= {*rows, "autobucketing_reordering"}
    assert rows["transformer_block_bucketing"]["options"] == {"gather": True, "scatter": True}
    assert rows["regional_inductor"]["options"] == {"modules": ""}


# broken passes: the checks can fail


@dataclass(frozen=True)
class Broken(Pass):
    """Breaks the graph in the way that `how` says."""

    name: ClassVar[str] = "broken"
    summary: ClassVar[str] = "breaks the graph"
    how: str = ""

    def run(self, graph: Graph, context: PassContext) -> Graph:
        module = editable(graph)
        nodes = list(module.graph.nodes)
        if self.how == "order":
            nodes[-2].prepend(nodes[0])  # an input after what reads it
        elif self.how == "output":
            nodes[-1].args = (list(nodes[-1].args[0])[:-1],)
        elif self.how == "wait":
            wait = next(node for node in nodes if "wait_tensor" in str(node.target))
            wait.replace_all_uses_with(wait.args[0])
            module.graph.erase_node(wait)
        elif self.how == "signature":
            return replace(graph.with_module(module, "broken"), inputs=graph.inputs[::-1])
        return graph.with_module(module, "broken")

    def ensure(self, before: Graph, after: Graph) -> None:
        if self.how == "claim":
            raise PassError("broken claimed too much")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("order", "pass broken gave back a graph that is not valid: the graph is not well formed"),
        ("output", "pass broken gave back a graph that is not valid: the graph has 21 outputs, its signature has 22"),
        ("wait", r"pass broken gave back .* reads the collective all_gather_into_tensor.* before any wait_tensor"),
        ("signature", "pass broken changed the graph's signature"),
        ("claim", "broken claimed too much"),
    ],
)
def test_a_broken_graph_is_refused_and_the_pass_named(how: str, message: str, sharded: Any) -> None:
    graph = sharded()
    Pipeline((Broken(),)).run(graph)  # the same pass, when it breaks nothing, is accepted
    with pytest.raises(PassError, match=message):
        Pipeline((Broken(how),)).run(graph)


def test_a_graph_that_was_broken_before_the_pipeline_is_refused_too(graph: Graph) -> None:
    with pytest.raises(GraphError, match="placeholders, its signature has"):
        Pipeline.parse("transformer_block_bucketing").run(replace(graph, inputs=graph.inputs[1:]))


def test_bucketing_refuses_a_graph_that_writes_in_place() -> None:
    module = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
    x = module.graph.placeholder("x")
    module.graph.output(module.graph.call_function(torch.ops.aten.add_.Tensor, (x, 1)))
    module.recompile()
    from torchspan.core.graph import InputSpec, OutputSpec

    graph = Graph(module, (InputSpec("input", "0"),), (OutputSpec("output", "0"),))
    with pytest.raises(PassError, match=r"transformer_block_bucketing moves nodes, but add_.* writes in place"):
        Pipeline.parse("transformer_block_bucketing").run(graph)


def test_the_claims_of_both_passes_can_fail(sharded: Any) -> None:
    graph = sharded()
    bucketed = Pipeline.parse("transformer_block_bucketing").run(graph)
    with pytest.raises(PassError, match=r"transformer_block_bucketing made \d+ \w+ of \d+; expected no more"):
        verify_result(TransformerBlockBucketing(), bucketed, replace(graph, notes=()))
    with pytest.raises(PassError, match="regional_inductor changed the collectives"):
        verify_result(RegionalInductor(), graph, bucketed)


def test_nodes_that_wait_for_each_other_are_told() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(torch.neg, (x,))
    second = graph.call_function(torch.neg, (first,))
    graph.output(second)
    first.args = (second,)
    with pytest.raises(PassError, match="3 nodes wait for each other: neg, neg_1, output"):
        reorder(graph, {})
