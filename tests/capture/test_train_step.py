"""A training step as one graph: bitwise eager's, with a signature that says what is what."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchspan.capture._choose import capture_training, choose_capture
from torchspan.capture._state import BoundGraph
from torchspan.capture.joint import capture_joint, is_supported
from torchspan.capture.train_step import capture_train_step
from torchspan.core.errors import CaptureError, InputError, UnknownNameError, UnsupportedError
from torchspan.core.graph import Graph
from torchspan.core.program import Program
from torchspan.core.report import Report
from torchspan.models.llama3 import FLAVOURS, MODEL, Llama3
from torchspan.parallel.mesh import TP, Degrees, build_meshes, submesh
from torchspan.parallel.simple_fsdp import apply_simple_fsdp
from torchspan.parallel.tensor_parallel import apply_tensor_parallel

CAPTURES = [
    pytest.param(capture_train_step, id="train_step"),
    pytest.param(
        capture_joint, id="joint", marks=pytest.mark.skipif(not is_supported(), reason="this torch exports no joint graph")
    ),
]


class Loss(nn.Module):
    """Cross-entropy of a model's logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.model(tokens).flatten(0, 1), labels.flatten())


class Various(nn.Module):
    """What trips captures: tied weights, a buffer, an unused and a frozen parameter, silu, dropout that is off."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.full((8,), 0.5), requires_grad=False)
        self.register_buffer("scale", torch.linspace(0.5, 2, 8))
        self.dropout = nn.Dropout(0.0)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) * self.scale + self.frozen
        x = x + F.silu(x) * torch.tanh(x) + F.mish(x)
        return self.head(self.dropout(x))


def _tokens(high: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(high, (2, 12), generator=draw), torch.randint(high, (2, 12), generator=draw)


def _eager(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor | None]]:
    loss = module(*inputs)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = None
    return loss, gradients


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("build", [lambda: Llama3(FLAVOURS["tiny"]).init_weights(0), Various], ids=["llama3", "various"])
def test_loss_and_every_gradient_are_bitwise_those_of_eager(
    capture: Callable[[Program], Graph], build: Callable[[], nn.Module]
) -> None:
    module = Loss(build())
    inputs = _tokens(16)
    loss, gradients = _eager(module, inputs)
    graph = capture(Program(module, inputs))
    assert torch.equal(BoundGraph(graph, module)(*inputs), loss)
    for name, parameter in module.named_parameters():
        expected = gradients[name]
        assert (parameter.grad is None) == (expected is None), name
        assert expected is None or torch.equal(parameter.grad, expected), name  # type: ignore[arg-type]


@pytest.mark.parametrize("capture", CAPTURES)
def test_the_signature_names_every_input_and_output(capture: Callable[[Program], Graph]) -> None:
    module = Loss(Various())
    graph = capture(Program(module, _tokens(16)))
    assert [(s.kind, s.name) for s in graph.inputs if s.kind != "tangent"] == [
        ("parameter", "model.unused"),
        ("parameter", "model.frozen"),
        ("parameter", "model.embed.weight"),
        ("buffer", "model.scale"),
        ("input", "0"),
        ("input", "1"),
    ]
    assert [(s.kind, s.name) for s in graph.outputs] == [("loss", "loss"), ("gradient", "model.embed.weight")]
    assert graph.kind == capture.__name__.removeprefix("capture_")
    graph.verify()


@pytest.mark.parametrize("capture", CAPTURES)
def test_what_is_changed_after_the_capture_is_used(capture: Callable[[Program], Graph]) -> None:
    module, inputs = Loss(Various()), _tokens(16)
    step = BoundGraph(capture(Program(module, inputs)), module)
    with torch.no_grad():
        module.model.embed.weight.mul_(2)  # type: ignore[union-attr, operator]
        module.model.scale.add_(1)  # type: ignore[union-attr, operator]
    assert torch.equal(step(*inputs), module(*inputs))


@pytest.mark.parametrize("capture", CAPTURES)
def test_nodes_of_forward_and_backward_say_which_module_they_come_from(capture: Callable[[Program], Graph]) -> None:
    graph = capture(Program(Loss(Llama3(FLAVOURS["tiny"]).init_weights(0)), _tokens(16)))
    paths = [node.meta.get("custom", {}).get("module") for node in graph.module.graph.nodes if "mm" in str(node.target)]
    # forward once, backward twice: for the input and for the weight
    assert paths.count("model.layers.1.feed_forward.w2") == 3 and None not in paths


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_sharded_step_has_a_gather_and_a_scatter_a_parameter_and_writes_nothing_in_place(
    capture: Callable[[Program], Graph], fake_ranks: int
) -> None:
    mesh = build_meshes(Degrees(4, 2), fake_ranks).dense
    assert mesh is not None
    model = Llama3(FLAVOURS["tiny"]).init_weights(0)
    apply_tensor_parallel(model, submesh(mesh, TP), MODEL.tensor_parallel)  # type: ignore[arg-type]
    module = Loss(apply_simple_fsdp(model, mesh))
    graph = capture(Program(module, _tokens(16)))
    num_parameters = len(list(module.parameters()))
    dp_group = mesh["dp_shard"].get_group().group_name
    gathers = [node for node in graph.module.graph.nodes if "all_gather_into_tensor" in str(node.target)]
    scatters = [node for node in graph.module.graph.nodes if "reduce_scatter_tensor" in str(node.target)]
    assert sum(node.args[-1] == dp_group for node in gathers) == num_parameters == 21
    assert sum(node.args[-1] == dp_group for node in scatters) == num_parameters
    mutable = [
        n for n in graph.module.graph.nodes if isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable
    ]
    assert mutable == []


@pytest.mark.parametrize("capture", CAPTURES)
def test_what_is_no_training_step_is_refused(capture: Callable[[Program], Graph]) -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    with pytest.raises(InputError, match="captured of a module that returns its loss, not of relu"):
        capture(Program(F.relu, (torch.ones(2),)))
    with pytest.raises(InputError, match="input 0 of a training step is a object; expected tensors, numbers, text or None"):
        capture(Program(Plain(), (object(),)))
    with pytest.raises(InputError, match=r"input x requires a gradient, and a captured step gives none to inputs; detach it"):
        capture(Program(Plain(), (), {"x": torch.ones((), requires_grad=True)}))
    with pytest.raises(CaptureError, match=r"Plain returned a tensor of shape \(2,\); a training step needs a scalar loss"):
        capture(Program(Plain(), (torch.ones(2),)))


def test_the_choice_is_recorded_and_a_joint_graph_that_torch_lacks_is_refused() -> None:
    report = Report()
    graph = capture_training(Program(Loss(Various()), _tokens(16)), report=report)
    (decision,) = report.decisions
    assert decision.topic == "capture" and decision.choice == graph.kind == ("joint" if is_supported() else "train_step")
    assert choose_capture("auto", has_joint=True)[0] == "joint"
    with pytest.raises(UnknownNameError, match="no capture 'jiont'; did you mean 'joint'"):
        choose_capture("jiont", has_joint=True)
    if not is_supported():
        with pytest.raises(UnsupportedError, match=r"cannot export a joint graph with descriptors \(2\.10 and later can\)"):
            capture_joint(Program(Loss(Various()), _tokens(16)))
