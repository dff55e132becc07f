"""The optimizer in a captured step: parameters, states and losses are bitwise those of an eager backward and torch's step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from torchspan.capture._state import BoundGraph
from torchspan.capture.joint import capture_joint, is_supported
from torchspan.capture.train_step import capture_train_step
from torchspan.core.errors import GuardError, InputError
from torchspan.core.graph import Graph
from torchspan.core.program import Program
from torchspan.models.llama3 import FLAVOURS, MODEL, Llama3
from torchspan.parallel.mesh import TP, Degrees, build_meshes, submesh
from torchspan.parallel.simple_fsdp import apply_simple_fsdp
from torchspan.parallel.tensor_parallel import apply_tensor_parallel
from torchspan.passes._pipeline import Pipeline

Make = Callable[[nn.Module], Optimizer]
TOKENS = torch.randint(16, (6, 2, 12), generator=torch.Generator().manual_seed(1))


class LlamaLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Llama3(FLAVOURS["tiny"]).init_weights(0)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.cross_entropy(self.model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class Small(nn.Module):
    """A tied, a frozen and an unused parameter, one whose gradient comes transposed, and a buffer that changes."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 7, dtype=dtype)
        self.head = nn.Linear(7, 16, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.mix = nn.Parameter(torch.randn(7, 7, dtype=dtype))
        self.unused = nn.Parameter(torch.ones(3, dtype=dtype))
        self.frozen = nn.Parameter(torch.full((7,), 0.5, dtype=dtype), requires_grad=False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, tokens: Tensor) -> Tensor:
        self.seen.add_(1)
        x = self.embed(tokens) @ self.mix.t() + self.frozen
        return F.cross_entropy(self.head(F.silu(x)).flatten(0, 1).float(), tokens.flatten())


def _train(
    module: nn.Module, optimizer: Optimizer, step: Callable[[Tensor], Tensor] | None, batches: Any = TOKENS
) -> list[float]:
    """Take a step a batch, with `step` or eagerly, and have a scheduler change the learning rates; the losses."""
    scheduler = ExponentialLR(optimizer, 0.7)
    losses = []
    for batch in batches:
        if step is None:
            optimizer.zero_grad()
            loss = module(batch)
            loss.backward()
            optimizer.step()
        else:
            loss = step(batch)
        scheduler.step()
        losses.append(loss.item())
    return losses


def _assert_same(actual: Any, other: Any, at: str = "") -> None:
    """Two nested values are equal, tensors in every bit."""
    if isinstance(actual, Tensor):
        assert isinstance(other, Tensor) and (actual.dtype, actual.stride()) == (other.dtype, other.stride()), at
        assert torch.equal(actual, other), at
    elif isinstance(actual, Mapping):
        assert list(actual) == list(other), at
        for key, value in actual.items():
            _assert_same(value, other[key], f"{at}.{key}")
    elif isinstance(actual, list):
        assert len(actual) == len(other), at
        for index, value in enumerate(actual):
            _assert_same(value, other[index], f"{at}.{index}")
    else:
        assert actual == other, at


def _assert_equal_to_eager(build: Callable[[], nn.Module], make: Make, capture: Callable[..., Graph]) -> None:
    eager, program = build(), build()
    theirs, ours = make(eager), make(program)
    step = BoundGraph(capture(Program(program, (TOKENS[0],)), optimizer=ours), program, optimizer=ours)
    assert _train(program, ours, step) == _train(eager, theirs, None)
    _assert_same(program.state_dict(), eager.state_dict())
    _assert_same(ours.state_dict(), theirs.state_dict())
    assert all(parameter.grad is None for parameter in program.parameters())


OPTIMIZERS: dict[str, Make] = {
    "AdamW": lambda m: AdamW(m.parameters(), lr=0.01, weight_decay=0.1, betas=(0.9, 0.95)),
    "AdamW amsgrad": lambda m: AdamW(m.parameters(), lr=0.01, amsgrad=True, weight_decay=0),
    "Adam": lambda m: Adam(m.parameters(), lr=0.01, weight_decay=0.1, maximize=True),
    "SGD": lambda m: SGD(m.parameters(), lr=0.1, weight_decay=0.1),
    "SGD momentum": lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9),
    "SGD dampening": lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "SGD nesterov": lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True, maximize=True),
    "two groups": lambda m: AdamW(
        [{"params": [m.mix], "lr": 0.1, "weight_decay": 0.0}, {"params": [m.unused, m.embed.weight]}]
    ),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in OPTIMIZERS), ("AdamW", torch.bfloat16), ("SGD dampening", torch.bfloat16)],
)
def test_parameters_and_states_are_eagers_with_every_option(name: str, dtype: torch.dtype) -> None:
    _assert_equal_to_eager(lambda: Small(dtype), OPTIMIZERS[name], capture_train_step)


@pytest.mark.parametrize(
    ("capture", "name"),
    [
        (capture_train_step, "AdamW"),
        (capture_train_step, "SGD momentum"),
        pytest.param(capture_joint, "AdamW", marks=pytest.mark.skipif(not is_supported(), reason="no joint graph")),
    ],
)
def test_a_llama_trains_as_eagerly(capture: Callable[..., Graph], name: str) -> None:
    _assert_equal_to_eager(LlamaLoss, OPTIMIZERS[name], capture)


@pytest.mark.parametrize("name", ["AdamW", "SGD dampening"])
def test_training_goes_on_eagerly_from_the_state_dict_and_comes_back(name: str) -> None:
    make = OPTIMIZERS[name]
    eager, program = Small(), Small()
    theirs, ours = make(eager), make(program)
    graph = capture_train_step(Program(program, (TOKENS[0],)), optimizer=ours)
    losses = [*_train(program, ours, BoundGraph(graph, program, optimizer=ours), TOKENS[:2])]
    between = make(program)
    between.load_state_dict(copy.deepcopy(ours.state_dict()))
    losses += _train(program, between, None, TOKENS[2:4])
    between.zero_grad()
    ours.load_state_dict(copy.deepcopy(between.state_dict()))
    step = BoundGraph(capture_train_step(Program(program, (TOKENS[0],)), optimizer=ours), program, optimizer=ours)
    losses += _train(program, ours, step, TOKENS[4:])
    assert losses == [loss for part in (TOKENS[:2], TOKENS[2:4], TOKENS[4:]) for loss in _train(eager, theirs, None, part)]
    _assert_same(program.state_dict(), eager.state_dict())
    _assert_same(ours.state_dict(), theirs.state_dict())


def test_parameters_that_have_taken_fewer_steps_have_numbers_of_their_own() -> None:
    def make(module: nn.Module) -> Optimizer:
        optimizer = AdamW(module.parameters(), lr=0.01)
        module.mix.grad = torch.ones_like(module.mix)
        optimizer.step()
        optimizer.zero_grad()
        return optimizer

    _assert_equal_to_eager(Small, make, capture_train_step)


def test_a_parameter_that_the_optimizer_has_not_keeps_its_gradient() -> None:
    module = Small()
    optimizer = SGD([module.mix], lr=0.1)
    graph = capture_train_step(Program(module, (TOKENS[0],)), optimizer=optimizer)
    assert [f"{spec.kind} {spec.name}" for spec in graph.outputs] == [
        "loss loss", "gradient embed.weight", "mutation seen", "mutation mix"
    ]  # fmt: skip
    weight = copy.deepcopy(module.embed.weight)
    BoundGraph(graph, module, optimizer=optimizer)(TOKENS[0])
    assert module.mix.grad is None and module.embed.weight.grad is not None and torch.equal(weight, module.embed.weight)


def test_an_optimizer_of_a_sharded_model_is_elementwise_and_scatters_are_still_merged(fake_ranks: int) -> None:
    mesh = build_meshes(Degrees(4, 2), fake_ranks).dense
    assert mesh is not None
    module = LlamaLoss()
    apply_tensor_parallel(module.model, submesh(mesh, TP), MODEL.tensor_parallel)  # type: ignore[arg-type]
    apply_simple_fsdp(module.model, mesh)
    optimizer = AdamW(module.parameters(), lr=0.01)
    graph = capture_train_step(Program(module, (TOKENS[0],)), optimizer=optimizer)
    merged = Pipeline.parse("transformer_block_bucketing").run(graph)
    fewer = graph.num_collectives() - merged.num_collectives()
    assert fewer["reduce_scatter_tensor"] == fewer["all_gather_into_tensor"] > 10
    for each_graph in (graph, merged):
        assert each_graph.count_targets()["aten.addcdiv.default"] == len(list(module.parameters())) == 21
        assert not any(
            node.target._schema.is_mutable for node in each_graph.module.graph.nodes if hasattr(node.target, "_schema")
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: torch.optim.Adagrad(p),
            "the optimizer is an Adagrad; a captured step can hold torch.optim.SGD, Adam and AdamW",
        ),
        (
            lambda p: AdamW(p, fused=True),
            "group 0 of the AdamW has fused=True; a captured step computes as torch does without it",
        ),
        (lambda p: SGD(p, foreach=True), "group 0 of the SGD has foreach=True"),
        (lambda p: Adam(p, lr=torch.tensor(0.1)), r"lr of group 0 of the Adam is a Tensor; .* give it float\(lr\)"),
        (
            lambda p: SGD([*p, nn.Parameter(torch.ones(2))]),
            r"group 0 of the SGD has a parameter of shape \(2,\) that Small has not",
        ),
    ],
)
def test_an_optimizer_that_a_graph_cannot_hold_is_named(make: Callable[..., Optimizer], message: str) -> None:
    module = Small()
    with pytest.raises(InputError, match=message):
        capture_train_step(Program(module, (TOKENS[0],)), optimizer=make(module.parameters()))


def test_a_graph_is_bound_with_the_optimizer_that_it_holds_and_gradients_do_not_add_up() -> None:
    module = Small()
    optimizer = SGD(module.parameters(), lr=0.1)
    program = Program(module, (TOKENS[0],))
    graph = capture_train_step(program, optimizer=optimizer)
    with pytest.raises(InputError, match="the graph holds a step of the optimizer; bind it with"):
        BoundGraph(graph, module)
    with pytest.raises(InputError, match="accumulate=True adds gradients up over calls"):
        BoundGraph(graph, module, accumulate=True, optimizer=optimizer)
    with pytest.raises(InputError, match="the graph was captured without an optimizer"):
        BoundGraph(capture_train_step(program), module, optimizer=optimizer)
    optimizer.register_step_post_hook(lambda *_: None)
    with pytest.raises(InputError, match="the SGD has hooks on its step"):
        BoundGraph(graph, module, optimizer=optimizer)(TOKENS[0])


def test_an_optimizer_that_is_no_longer_as_captured_is_told_and_nothing_is_updated() -> None:
    module = Small()
    optimizer = AdamW(module.parameters(), lr=0.1, weight_decay=0.1)
    step = BoundGraph(capture_train_step(Program(module, (TOKENS[0],)), optimizer=optimizer), module, optimizer=optimizer)
    before = copy.deepcopy(module.state_dict())
    (group,) = optimizer.param_groups
    module.mix.grad = torch.ones_like(module.mix)
    with pytest.raises(GuardError, match=r"parameter mix has a gradient from before, .*; call optimizer.zero_grad\(\)"):
        step(TOKENS[0])
    optimizer.zero_grad()
    group["weight_decay"] = 0.0
    with pytest.raises(
        GuardError, match=r"group 0 of the optimizer is Adam.* the step was captured for Adam.*capture the step again"
    ):
        step(TOKENS[0])
    group["weight_decay"] = 0.1
    parameters, group["params"] = group["params"], [module.mix]
    with pytest.raises(GuardError, match=r"group 0 of the optimizer no longer has parameter embed\.weight"):
        step(TOKENS[0])
    group["params"] = parameters
    assert not optimizer.state
    _assert_same(module.state_dict(), before)
    step(TOKENS[0])
    optimizer.state[module.mix]["step"] += 1
    with pytest.raises(
        GuardError, match=r"parameters embed\.weight and mix have taken different numbers of steps|parameters mix and embed"
    ):
        step(TOKENS[0])
    optimizer.state[module.mix]["step"] -= 1
    optimizer.state[module.mix]["exp_avg"] = torch.zeros(2)
    with pytest.raises(
        GuardError, match=r"state optimizer\.exp_avg\.mix is \(2,\) of torch\.float32 on cpu; expected \(7, 7\)"
    ):
        step(TOKENS[0])
