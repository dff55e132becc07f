"""What a captured step does to the state of its module: buffers, tied, frozen and unused parameters, gradients that add up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from torchspan.capture._state import BoundGraph
from torchspan.capture.joint import capture_joint, is_supported
from torchspan.capture.train_step import capture_train_step
from torchspan.core.errors import CaptureError, GuardError, InputError
from torchspan.core.graph import Graph
from torchspan.core.program import Program

Capture = Callable[[Program], Graph]

CAPTURES = [
    pytest.param(capture_train_step, id="train_step"),
    pytest.param(
        capture_joint, id="joint", marks=pytest.mark.skipif(not is_supported(), reason="this torch exports no joint graph")
    ),
]


class Stateful(nn.Module):
    """Changes buffers in every way: by an operator that hides it, in place, in part, by assignment, one by another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4, momentum=0.3)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.scale, self.shift = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.25))
        self.frozen = nn.Parameter(torch.full((4,), 0.5), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("bias", torch.zeros(7))
        self.register_buffer("seen", torch.zeros(7, dtype=torch.int64))
        self.register_buffer("rounded", torch.zeros(4, dtype=torch.bfloat16))
        self.register_buffer("last", torch.zeros(4))
        self.register_buffer("before_last", torch.zeros(4))
        self.register_buffer("read_only", torch.linspace(0.5, 2, 4))

    def forward(self, tokens_B: Tensor) -> Tensor:
        x_BD = F.silu(self.norm(self.embed(tokens_B) * self.read_only) + self.frozen + (self.scale + self.shift))
        logits_BV = self.head(x_BD) + self.bias
        with torch.no_grad():
            counts_V = F.one_hot(tokens_B, 7).sum(0)
            self.seen += counts_V
            self.seen[0] = tokens_B[0]
            self.bias.add_(torch.sign(counts_V.float().mean() - counts_V), alpha=0.1)
            self.rounded.mul_(0.5).add_(x_BD.mean(0))  # in the precision of the buffer, not of what is added
        self.before_last = self.last
        self.last = x_BD.detach().mean(0)
        return F.cross_entropy(logits_BV + self.bias, tokens_B)


def _batches() -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(7, (6,), generator=draw) for _ in range(4)]


def _assert_same_state(actual: nn.Module, expected: nn.Module) -> None:
    for name, buffer in expected.named_buffers():
        assert torch.equal(actual.get_buffer(name), buffer), name
    for name, parameter in expected.named_parameters():
        gradient = actual.get_parameter(name).grad
        assert (gradient is None) == (parameter.grad is None), name
        assert gradient is None or torch.equal(gradient, parameter.grad), name  # type: ignore[arg-type]
        assert gradient is None or gradient.stride() == parameter.grad.stride(), name  # type: ignore[union-attr]


@pytest.mark.parametrize("capture", CAPTURES)
def test_buffers_and_gradients_are_bitwise_those_of_eager_on_later_batches(capture: Capture) -> None:
    eager, captured = Stateful(), Stateful()
    before = deepcopy(captured.state_dict())
    graph = capture(Program(captured, (_batches()[0],)))
    assert all(torch.equal(value, before[name]) for name, value in captured.state_dict().items()), "a capture changes nothing"
    changed = [name for name, _ in captured.named_buffers() if name != "read_only"]
    assert sorted(spec.name for spec in graph.outputs if spec.kind == "mutation") == sorted(changed)
    assert [spec.name for spec in graph.inputs if "weight" in spec.name] == ["embed.weight", "norm.weight"]
    written = [n for n in graph.module.graph.nodes if getattr(getattr(n.target, "_schema", None), "is_mutable", False)]
    assert written == [] and "aten.native_batch_norm.default" not in graph.count_targets()
    replacing = BoundGraph(graph, captured)
    adding = BoundGraph(graph, captured, accumulate=True)
    # one that replaces, then two micro-batches of one that adds up
    for step, is_new, tokens in zip((replacing, replacing, adding, adding), (True, True, False, False), _batches()):
        if is_new:
            eager.zero_grad(set_to_none=True)
        loss = eager(tokens)
        loss.backward()
        assert torch.equal(step(tokens), loss)
        _assert_same_state(captured, eager)
    gradients = {parameter.grad.data_ptr() for parameter in captured.parameters() if parameter.grad is not None}
    assert len(gradients) == 5, "no gradient shares memory with another"
    paths = {node.meta.get("custom", {}).get("module") for node in graph.module.graph.nodes if "norm" in str(node.target)}
    assert paths == {"norm"}, "nodes keep their origin"


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_buffer_that_eager_steps_assign_in_between_is_the_one_that_is_used(capture: Capture) -> None:
    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))
            self.register_buffer("ema", torch.tensor(1.0))

        def forward(self, x: Tensor) -> Tensor:
            self.ema = 0.5 * self.ema + x
            return self.weight * self.ema

    eager, captured, x = Averaged(), Averaged(), torch.tensor(3.0)
    step = BoundGraph(capture(Program(captured, (x,))), captured)
    for _ in range(2):
        assert torch.equal(step(x), eager(x))
        assert torch.equal(captured(x), eager(x))
        assert torch.equal(captured.ema, eager.ema)


class _Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("ema", torch.ones(3))
        self.register_buffer("other", torch.ones(3))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.change(x)
        return (self.weight * x * self.ema).sum()

    def change(self, x: Tensor) -> None:
        raise NotImplementedError


class _WritesParameter(_Weighted):
    def change(self, x: Tensor) -> None:
        self.weight.clamp_(max=0.5)


class _WritesInput(_Weighted):
    def change(self, x: Tensor) -> None:
        x.mul_(2)


class _OtherShape(_Weighted):
    def change(self, x: Tensor) -> None:
        self.ema = x.mean(0, keepdim=True)


class _OneTensor(_Weighted):
    def change(self, x: Tensor) -> None:
        self.ema = self.other


class _SetsNone(_Weighted):
    def change(self, x: Tensor) -> None:
        self.nothing = x * 2


class _WithGradient(_Weighted):
    def change(self, x: Tensor) -> None:
        with torch.enable_grad():
            self.ema = self.weight * x


class _Decides(_Weighted):
    def change(self, x: Tensor) -> None:
        if x.sum() > 0:
            self.ema.add_(1)


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (_WritesParameter, "writes into parameter weight; a training step may change buffers only; update it after the step"),
        (_WritesInput, "writes into input 0; a training step may change buffers only; clone it first"),
        (_OtherShape, r"sets ema to a tensor \(1,\) of torch.float32 on cpu; a captured step needs \(3,\)"),
        (_OneTensor, "makes ema and other one tensor; clone it"),
        (_SetsNone, "sets nothing, which is None before the step; register a tensor there"),
        (_WithGradient, "sets ema to a tensor that requires a gradient; detach it"),
        (_Decides, "decides by the value of a tensor"),
    ],
)
def test_a_change_that_a_graph_cannot_make_is_refused(capture: Capture, module: type[_Weighted], message: str) -> None:
    program = module()
    with pytest.raises(CaptureError, match=message):
        capture(Program(program, (torch.ones(3),)))
    assert program.nothing is None and torch.equal(program.ema, torch.ones(3))


@pytest.mark.parametrize("capture", CAPTURES)
def test_an_attribute_that_forward_sets_is_left_alone_and_that_is_logged(
    capture: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    class Noted(_Weighted):
        def change(self, x: Tensor) -> None:
            self.note = x * 2

    module = Noted()
    capture(Program(module, (torch.ones(3),)))
    assert not hasattr(module, "note")
    assert "Noted sets note; a captured step does not: register it as a buffer" in caplog.text


def test_a_graph_is_bound_to_a_module_that_has_what_it_takes() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(3.0))

        def forward(self) -> Tensor:
            return self.weight.square()

    graph = capture_train_step(Program(Square()))
    with pytest.raises(InputError, match="Identity has no weight, which the graph takes"):
        BoundGraph(graph, nn.Identity())


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone: collectives compute."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_tied_dtensor_is_one_input_with_one_gradient_that_adds_up(capture: Capture, one_rank: None) -> None:
    mesh = init_device_mesh("cpu", (1,))

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(4, 4, bias=False)
            self.first.weight = nn.Parameter(distribute_tensor(torch.randn(4, 4), mesh, [Shard(0)]))
            self.second = nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight
            self.register_buffer("seen", distribute_tensor(torch.zeros(4), mesh, [Replicate()]))

        def forward(self, x: Tensor) -> Tensor:
            x = self.second(torch.tanh(self.first(x)))
            with torch.no_grad():
                self.seen.add_(x.sum(0).redistribute(placements=[Replicate()]))
            return x.square().sum().full_tensor()

    eager, captured = Tied(), Tied()
    draw = torch.Generator().manual_seed(1)
    batches = [distribute_tensor(torch.randn(3, 4, generator=draw), mesh, [Replicate()]) for _ in range(3)]
    graph = capture(Program(captured, (batches[0],)))
    assert [spec.name for spec in graph.inputs if spec.kind == "parameter"] == ["first.weight"]
    step = BoundGraph(graph, captured, accumulate=True)
    with pytest.raises(GuardError, match="input 0 is laid out as None; the step was captured for Layout"):
        step(torch.ones(3, 4))
    for x in batches:
        loss = eager(x)
        loss.backward()
        assert torch.equal(step(x), loss)
        actual, expected = captured.first.weight.grad, eager.first.weight.grad
        assert isinstance(actual, DTensor) and actual.placements == (Shard(0),) and isinstance(expected, DTensor)
        assert torch.equal(actual.to_local(), expected.to_local())
        assert torch.equal(captured.seen.to_local(), eager.seen.to_local())  # type: ignore[operator, union-attr]
