"""A backward that compiled code does not have is eager's: second derivatives, batched gradients, kernels that fail."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from torchspan.core.numerics import difference
from torchspan.regions import caching
from torchspan.regions.backward import BATCHED, TWICE, EagerBackward

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it


class Mixed(nn.Module):
    """Draws random numbers, keeps statistics, and gives a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(nn.functional.dropout(torch.tanh(self.norm(self.first(x))))).transpose(0, 1)


class Tied(nn.Module):
    """Uses one layer twice, and gives several outputs in a dict; one of them has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = self.layer(self.layer(x).tanh())
        return {"y": y, "parts": (y.sin(), (x * x).sum(1)), "count": (x > 0).sum()}


MODELS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)),
    "mixed": Mixed,
    "spectral": lambda: nn.Sequential(spectral_norm(nn.Linear(8, 16)), nn.Tanh(), nn.Linear(16, 1)),
    "tied": Tied,
}


def compiled(model: nn.Module, reasons: list[str], fails: bool = False) -> Callable[..., Any]:
    """`model` by aot_eager behind an EagerBackward; with `fails`, its backward raises."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def raises(*args: Any) -> Any:
        raise RuntimeError("kernel fault")

    inner = aot_autograd(
        fw_compiler=lambda graph, inputs: make_boxed_func(graph),
        bw_compiler=lambda graph, inputs: make_boxed_func(raises if fails else graph),
    )

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        with caching.keeping_buffers():
            return EagerBackward(graph.forward, inner(graph, inputs), reasons.append)

    torch._dynamo.reset()
    return torch.compile(model, backend=backend)


def total(outputs: Any) -> torch.Tensor:
    tensors = [tensor for tensor in torch.utils._pytree.tree_leaves(outputs) if tensor.requires_grad]
    return sum((tensor.sin() * torch.arange(1.0, tensor.numel() + 1).view(tensor.shape)).sum() for tensor in tensors)  # type: ignore[return-value]


def step(run: Callable[..., Any], model: nn.Module, x: torch.Tensor, kind: str) -> list[torch.Tensor | None]:
    """The gradients of one step of this kind."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    loss = total(run(x * 1))
    sources = [x, *model.parameters()]
    if kind == "batched":
        return list(torch.autograd.grad([loss], sources, [torch.ones(3)], is_grads_batched=True))
    if kind == "twice":
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        loss = loss + slope.square().sum()
    loss.backward(retain_graph=kind == "kept")
    if kind == "kept":
        loss.backward()
    return [source.grad for source in sources]


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_backward_gives_eagers_gradients_buffers_and_random_numbers(name: str) -> None:
    torch.manual_seed(0)
    eager = MODELS[name]().double()
    torch.manual_seed(0)
    model = MODELS[name]().double()
    reasons: list[str] = []
    run = compiled(model, reasons)
    wanted = {"once": [], "kept": [], "twice": [TWICE], "batched": [BATCHED]}
    for seed, kind in enumerate(["once", "kept", "twice", "once", "batched", "twice"]):
        x = torch.randn(4, 8, dtype=torch.double)
        torch.manual_seed(seed)
        expected, state = step(eager, eager, x, kind), torch.get_rng_state()
        torch.manual_seed(seed)
        actual = step(run, model, x, kind)
        assert difference(actual, expected, torch.float32) is None, kind  # second derivatives lose digits
        assert torch.equal(state, torch.get_rng_state())
        assert difference(dict(model.named_buffers()), dict(eager.named_buffers())) is None
        assert reasons == wanted[kind]
        reasons.clear()


def test_a_backward_that_fails_is_eagers() -> None:
    model, x, reasons = MODELS["perceptron"](), torch.randn(4, 8), []
    expected = step(model, model, x, "once")
    run = compiled(model, reasons, fails=True)
    assert difference(step(run, model, x, "once"), expected) is None
    assert reasons == ["compiled code raised RuntimeError in its backward: kernel fault"]


class Averaged(nn.Module):
    """Writes into a frozen parameter and into a trained one, as an average of weights and a limit on them do."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.mean = nn.Linear(8, 1), nn.Parameter(torch.ones(1, 8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.last.weight.clamp_(-0.2, 0.2).mul_(0.9)
            self.mean.lerp_(self.last.weight, 0.5)
        return self.last(x * self.mean).tanh()


def test_parameters_that_a_graph_writes_are_as_they_were_where_it_raises() -> None:
    def raises(*args: torch.Tensor) -> Any:
        graph(*args)
        if len(calls) > 1:
            raise RuntimeError("kernel fault")
        calls.append(None)

    def graph(written: torch.Tensor, trained: torch.Tensor, read: torch.Tensor) -> None:
        with torch.no_grad():
            written.add_(1), trained.add_(1)

    calls: list[None] = [None]
    args = [nn.Parameter(torch.zeros(2), requires_grad=is_trained) for is_trained in (False, True, False)]
    run = EagerBackward(graph, raises, lambda why: None)
    run(*args)
    with pytest.raises(RuntimeError, match="kernel fault"):
        run(*args)
    assert [arg[0].item() for arg in args] == [1, 1, 0] and run._changed == (0, 1)


def test_second_derivatives_of_a_graph_that_writes_parameters_are_eagers() -> None:
    torch.manual_seed(0)
    eager, model = Averaged(), Averaged()
    model.load_state_dict(eager.state_dict())
    reasons: list[str] = []
    run = compiled(model, reasons)
    for kind in ("once", "twice", "once"):
        x = torch.randn(4, 8)
        expected, actual = step(eager, eager, x, kind), step(run, model, x, kind)
        assert difference(actual, expected) is None, kind
        assert difference(dict(model.named_parameters()), dict(eager.named_parameters())) is None, kind
    assert reasons == [TWICE]


def test_what_eager_refuses_is_refused_and_nothing_is_kept_after_a_backward() -> None:
    model, reasons = nn.Linear(8, 8), []
    run = compiled(model, reasons)
    x = torch.randn(4, 8)
    outputs, held = run(x), weakref.ref(x)
    outputs.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        outputs.sum().backward()
    del x
    gc.collect()
    assert held() is None and reasons == []
    node = weakref.ref(outputs.grad_fn)
    del outputs
    assert node() is None
