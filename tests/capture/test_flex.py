"""A captured step with FlexAttention under document masks: bit by bit eager's, whatever the documents of a batch are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchspan.capture._choose import capture_training
from torchspan.capture._state import BoundGraph
from torchspan.capture.joint import is_supported
from torchspan.core.graph import Graph
from torchspan.core.program import Program
from torchspan.core.report import Report
from torchspan.devices.flex_attention import training_patches
from torchspan.environment.scope import Environment
from torchspan.models import deepseek_v3, llama3
from torchspan.passes._base import Pass, PassContext, editable
from torchspan.passes._instruments import Dump
from torchspan.passes._pipeline import Pipeline
from torchspan.train.data import END_OF_TEXT
from torchspan.train.loop import annotations_provided

CAPTURES = ["train_step", "joint"] if is_supported() else ["train_step"]
CONFIGS: dict[str, tuple[Any, Any]] = {
    "llama3": (llama3, replace(llama3.FLAVOURS["tiny_flex_attn"], num_layers=1)),
    "deepseek_v3": (deepseek_v3, replace(deepseek_v3.FLAVOURS["tiny_flex_attn"], num_layers=1, v_head_dim=4)),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # dynamo looks at it
]


class Loss(nn.Module):
    """Cross-entropy of the tokens themselves."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BS: Tensor) -> Tensor:
        return F.cross_entropy(self.model(tokens_BS).flatten(0, 1), tokens_BS.flatten())


class Copied(Pass):
    """Gives a copy."""

    name = "copied"
    summary = "a copy"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        return graph.with_module(editable(graph), "copied")


@pytest.fixture(autouse=True)
def trainable() -> Iterator[None]:
    """FlexAttention trains on a CPU."""
    with Environment(training_patches()):
        yield


def _program(name: str, **changes: Any) -> Loss:
    model, config = CONFIGS[name]
    return Loss(model.MODEL.build(replace(config, **changes)).init_weights(0))


def _batch(index: int) -> Tensor:
    """Two sequences; the first batch has no end of a document, each later one has ends of its own."""
    draw = torch.Generator().manual_seed(index)
    tokens_BS = torch.randint(32, 128, (2, 12), generator=draw)
    return tokens_BS.masked_fill(torch.rand(2, 12, generator=draw) < 0.2 * min(index, 1), END_OF_TEXT)


def _assert_bitwise(graph: Graph, name: str, program: Loss) -> None:
    eager, step = _program(name), BoundGraph(graph, program)
    for index in range(3):
        eager.zero_grad(set_to_none=True)
        program.zero_grad(set_to_none=True)
        loss = eager(_batch(index))
        loss.backward()
        assert torch.equal(step(_batch(index)), loss), index
        for (path, reference), parameter in zip(eager.named_parameters(), program.parameters()):
            assert reference.grad is not None and parameter.grad is not None and torch.equal(parameter.grad, reference.grad), (
                path
            )


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_step_is_eagers_in_every_bit_for_batches_of_other_documents(name: str, capture: str) -> None:
    program = _program(name)
    graph = capture_training(Program(program, (_batch(0),)), capture)
    assert graph.count_targets()["flex_attention"] == graph.count_targets()["flex_attention_backward"] == 1
    _assert_bitwise(graph, name, program)


@pytest.mark.parametrize("capture", CAPTURES)
def test_functions_of_masks_survive_passes_and_are_written_down(capture: str, tmp_path: Path) -> None:
    program = _program("llama3", annotate_regions=True)
    with annotations_provided(Report()):
        graph = capture_training(Program(program, (_batch(0),)), capture)
    after = Pipeline((Copied(),)).run(graph, instruments=[Dump(tmp_path)])
    _assert_bitwise(after, "llama3", program)
    text = (tmp_path / "01_copied.py").read_text()
    assert "class sdpa_mask0(torch.nn.Module)" in text and "torch.ops.higher_order.flex_attention_backward(" in text
    nodes = [node for node in after.module.graph.nodes if str(node.target).startswith("flex_attention")]
    for node in nodes:
        assert node.meta["custom"]["module"] == "model.layers.0.attention", node
        assert node.meta["custom"]["compile_with_inductor"] == "flex_attention", node
