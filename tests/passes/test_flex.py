"""FlexAttention in passes: dense operators of the same bits in the regions of a CPU, whole on what has kernels of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchspan.capture._state import BoundGraph
from torchspan.capture.train_step import capture_train_step
from torchspan.core.errors import PassError
from torchspan.core.graph import Graph
from torchspan.core.program import Program
from torchspan.core.report import Report
from torchspan.devices.flex_attention import training_patches
from torchspan.environment.scope import Environment
from torchspan.models.llama3 import FLAVOURS, Llama3
from torchspan.passes import regional_inductor
from torchspan.passes._base import PassContext
from torchspan.passes._pipeline import Pipeline
from torchspan.regions.graph_job import digest_of_graph
from torchspan.train.data import END_OF_TEXT
from torchspan.train.loop import annotations_provided

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # dynamo looks at it
]

TOKENS = torch.randint(32, 128, (2, 12), generator=torch.Generator().manual_seed(1))
TOKENS[0, 3] = TOKENS[1, 8] = END_OF_TEXT


class Loss(nn.Module):
    """Cross-entropy of the tokens themselves, in a model of two blocks whose attention is annotated, or is not."""

    def __init__(self, annotate: bool, mask: Any = "block_causal") -> None:
        super().__init__()
        self.model = Llama3(replace(FLAVOURS["tiny_flex_attn"], mask=mask, annotate_regions=annotate)).init_weights(0)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        return F.cross_entropy(self.model(tokens_BS).flatten(0, 1), tokens_BS.flatten())


class Recorder:
    """Compiles nothing, and keeps what it was given."""

    def __init__(self) -> None:
        self.modules: list[torch.fx.GraphModule] = []
        self.inputs: list[Sequence[Any]] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: Sequence[Any], name: str) -> Callable[..., Any]:
        self.modules.append(module)
        self.inputs.append(inputs)
        return module


@pytest.fixture(scope="module", autouse=True)
def trainable() -> Iterator[None]:
    """FlexAttention trains on a CPU."""
    with Environment(training_patches()):
        yield


@pytest.fixture(scope="module")
def capture() -> Callable[..., tuple[Graph, Loss]]:
    """The step of a model, and the model, by what it is built with; each is captured once."""
    process: dict[Any, tuple[Graph, Loss]] = {}

    def capture(annotate: bool = True, mask: str = "block_causal") -> tuple[Graph, Loss]:
        if (annotate, mask) not in process:
            program = Loss(annotate, mask)
            with annotations_provided(Report()):
                process[annotate, mask] = capture_train_step(Program(program, (TOKENS,))), program
        return process[annotate, mask]

    return capture


def _regional(graph: Graph, modules: str = "") -> tuple[Graph, Recorder, Report]:
    recorder, report = Recorder(), Report()
    text = f"regional_inductor{{modules={modules}}}" if modules else "regional_inductor"
    return Pipeline.parse(text).run(graph, PassContext(report, recorder)), recorder, report


def _results(graph: Graph, program: Loss) -> list[Tensor]:
    program.zero_grad(set_to_none=True)
    loss = BoundGraph(graph, program)(TOKENS)
    return [loss, *(parameter.grad for parameter in program.parameters() if parameter.grad is not None)]


def _num_flex(module: torch.fx.GraphModule) -> int:
    return sum(str(node.target).startswith("flex_attention") for node in module.graph.nodes if node.op == "call_function")


def test_dense_operators_in_a_region_of_a_cpu_have_the_bits_of_flex_attention(capture: Any) -> None:
    graph, program = capture()
    after, recorder, report = _regional(graph)
    assert _num_flex(graph.module) == 4 and _num_flex(after.module) == sum(map(_num_flex, recorder.modules)) == 0
    eager, ours = _results(graph, program), _results(after, program)
    assert len(eager) == len(ours) == 22
    assert all(torch.equal(actual, other) for actual, other in zip(eager, ours))
    decision = next(d for d in report.decisions if d.subject == "regional_inductor: FlexAttention")
    assert decision.choice == "4 → dense operators" and "no backward of it for a CPU" in decision.reason


def test_dense_attention_of_equal_blocks_is_compiled_once_each_way(capture: Any) -> None:
    _, recorder, report = _regional(capture()[0])
    counts = [Graph(module, (), ()).count_targets() for module in recorder.modules]
    assert [sum(count[f"aten.{name}.default"] for count in counts) for name in ("_safe_softmax", "exp")] == [1, 1]
    assert report.decisions[-1].choice == "8 regions, 4 compiled", "with those of feed-forwards"


def test_flex_attention_in_no_region_stays_as_it_is(capture: Any) -> None:
    graph, program = capture(annotate=False)
    after, _, report = _regional(graph, "*.feed_forward")
    assert _num_flex(after.module) == 4 and len(report.decisions) == 1
    assert all(torch.equal(actual, other) for actual, other in zip(_results(graph, program), _results(after, program)))


def test_elsewhere_it_is_whole_in_its_region_and_can_be_sent_to_the_compiler(
    capture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regional_inductor, "device_of", lambda node: torch.device("cuda"))
    _, documents, report = _regional(capture()[0])
    _, causal, _ = _regional(capture(mask="causal")[0])
    assert [_num_flex(module) for module in documents.modules if _num_flex(module)] == [1, 1], "of two blocks, each way"
    assert report.decisions[-1].choice == "8 regions, 4 compiled"
    digests = [digest_of_graph(r.modules[0], r.inputs[0]) for r in (documents, documents, causal)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_dense_attention_gives_the_gradients_of_eager(capture: Any) -> None:
    graph, program = capture()
    report = Report()
    after = Pipeline.parse("regional_inductor").run(graph, PassContext(report))
    assert [attempt.outcome for attempt in report.attempts] == ["compiled"] * 4
    for actual, reference in zip(_results(after, program), _results(graph, program)):
        assert (actual - reference).abs().max() <= 1e-5 * reference.abs().max()


# validate_flex_attn_annotation


def test_annotated_flex_attention_is_counted_and_left_alone(capture: Any) -> None:
    graph, _ = capture()
    report = Report()
    after = Pipeline.parse("validate_flex_attn_annotation").run(graph, PassContext(report))
    assert after.module is graph.module
    assert report.decisions[-1].choice == "4 nodes checked"


def test_flex_attention_that_nothing_would_compile_is_refused_by_its_module(capture: Any) -> None:
    graph, _ = capture(annotate=False)
    with pytest.raises(
        PassError, match=r"flex_attention in the module 'model.layers.0.attention' \(4 in all\) is in no region"
    ):
        Pipeline.parse("validate_flex_attn_annotation").run(graph)


def test_a_graph_without_flex_attention_is_valid(graph: Graph) -> None:
    report = Report()
    Pipeline.parse("validate_flex_attn_annotation").run(graph, PassContext(report))
    assert report.decisions[-1].reason == "the graph has no FlexAttention"
