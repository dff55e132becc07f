"""Precompile.dynamo and Precompile.aot_autograd: real bytecode, real guards, gradients, and errors that say what to do."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from torchspan.artifacts import Precompile
from torchspan.capture.dynamo import Guard
from torchspan.core.errors import CaptureError, CompileError, GuardError, InputError, UnsupportedError

SCALE = 2.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.calls: list[int] = []

    def forward(self, tokens: torch.Tensor, scales: dict[str, Any], shift: torch.Tensor | None = None) -> dict[str, Any]:
        x = self.dropout(self.norm(self.embed(tokens))) * scales["a"] * SCALE
        if shift is not None:
            x = x + shift
        return {"logits": self.head(x), "parts": [x.mean(), (tokens, len(scales))]}


def as_it_is(graph: GraphModule, example_inputs: Sequence[Any]) -> Any:
    return graph


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def example() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return torch.tensor([1, 2, 3, 1]), {"a": torch.full((4,), 0.5, requires_grad=True)}


def test_the_capture_is_real_and_runs_nothing(net: Net) -> None:
    before, state = {name: tensor.clone() for name, tensor in net.state_dict().items()}, torch.get_rng_state()
    inputs = example()
    gm, bytecode, guards, example_inputs = Precompile.dynamo(net, *inputs, shift=torch.ones(4))
    assert isinstance(gm, GraphModule) and isinstance(bytecode, types.CodeType) and bytecode.co_argcount == 3
    assert len(example_inputs) == 2 and all(result is input_ for result, input_ in zip(example_inputs, inputs))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert len(guards) > 20 and all(isinstance(guard, Guard) for guard in guards)
    assert {"TENSOR_MATCH", "TYPE_MATCH"} <= {guard.kind for guard in guards}
    (constant,) = {guard.value for guard in guards if guard.source.endswith(".SCALE")}
    assert constant == 2.0
    assert sorted(guards.managers) == [False, True] and "GuardManager" in str(guards.managers[True])


def test_results_gradients_and_buffers_are_those_of_eager(net: Net) -> None:
    eager = Net()
    eager.load_state_dict(net.state_dict())
    gm, _, guards, inputs = Precompile.dynamo(net, *example(), shift=torch.ones(4))
    compiled, same = Precompile.aot_autograd(gm, guards, compiler=as_it_is)
    assert same is guards
    results = []
    for function, module in (
        (lambda args, **kwargs: compiled(args, **kwargs), net),
        (lambda args, **k: eager(*args, **k), eager),
    ):
        inputs[1]["a"].grad = None
        torch.manual_seed(1)
        result = function(inputs, shift=torch.ones(4))
        (result["logits"].square().sum() + result["parts"][0]).backward()
        assert result["parts"][1][0] is inputs[0] and result["parts"][1][1] == 1
        results.append(
            [result["logits"].detach(), inputs[1]["a"].grad, *(p.grad for p in module.parameters()), *module.buffers()]
        )
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_a_transformed_graph_is_what_is_compiled() -> None:
    x = torch.ones(2)
    gm, _, guards, inputs = Precompile.dynamo(lambda x: x + 1, x)
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.args = (node.args[0], 10)
    gm.recompile()
    compiled, _ = Precompile.aot_autograd(gm, guards, compiler=as_it_is)
    assert compiled(inputs).tolist() == [11.0, 11.0]


def test_a_compiler_gets_the_forward_and_the_backward_as_operators() -> None:
    targets: list[set[str]] = []

    def compiler(graph: GraphModule, example_inputs: Sequence[Any]) -> Any:
        targets.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return graph

    model = nn.Linear(3, 2)
    gm, _, guards, inputs = Precompile.dynamo(model, torch.ones(1, 3))
    compiled, _ = Precompile.aot_autograd(gm, guards, compiler=compiler)
    compiled(inputs).sum().backward()
    assert len(targets) == 2 and all(name.startswith("aten.") for names in targets for name in names)
    assert torch.equal(model.weight.grad, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model.dropout, "p", 0.1), r"dropout"),
        (lambda model: model.eval(), "training"),
        (lambda model: model.head.register_forward_hook(lambda *_: None), "_forward_hooks"),
        (lambda model: model.register_forward_hook(lambda *_: None), "_forward_hooks"),
        (lambda model: model.norm.weight.requires_grad_(False), "requires_grad"),
        (lambda model: model.double(), "dtype mismatch. expected Float, actual Double"),
    ],
    ids=["attribute", "eval", "hook", "model-hook", "freeze", "dtype"],
)
def test_a_changed_model_is_refused_by_the_guard_that_names_it(net: Net, change: Any, message: str) -> None:
    gm, _, guards, inputs = Precompile.dynamo(net, *example())
    compiled, _ = Precompile.aot_autograd(gm, guards, compiler=as_it_is)
    compiled(inputs)
    change(net)
    with pytest.raises(GuardError, match=f"the graph of Net is not for this call: .*{message}"):
        compiled(inputs)


def test_other_inputs_and_other_modes_are_refused(net: Net) -> None:
    gm, _, guards, inputs = Precompile.dynamo(net, *example())
    compiled, _ = Precompile.aot_autograd(gm, guards, compiler=as_it_is)
    with pytest.raises(GuardError, match=r"size mismatch at index 0\. expected 4, actual 2"):
        compiled((inputs[0][:2], inputs[1]))
    with torch.autocast("cpu"), pytest.raises(GuardError, match="GLOBAL_STATE changed: autocast"):
        compiled(inputs)
    with pytest.raises(InputError, match=r"takes the tuple of inputs, not a Tensor; write \(x,\) for one"):
        compiled(inputs[0])
    gm, _, guards, inputs = Precompile.dynamo(lambda x: x + 1 if torch.is_grad_enabled() else x - 1, torch.ones(2))
    compiled, _ = Precompile.aot_autograd(gm, guards, compiler=as_it_is)
    with torch.no_grad(), pytest.raises(GuardError, match="grad mode is False, the program was captured with True"):
        compiled(inputs)


def branch(x: torch.Tensor) -> torch.Tensor:
    if x.sum() > 0:  # the line that the error names
        return x
    return x + 1


def test_what_is_not_one_graph_is_refused_with_the_line_and_the_way_out() -> None:
    line = branch.__code__.co_firstlineno + 1
    with pytest.raises(CaptureError) as error:
        Precompile.dynamo(branch, torch.ones(2))
    assert f"branch cannot be captured as one graph at {__file__}:{line}: Data-dependent branching" in str(error.value)
    assert "torch/_dynamo" not in str(error.value)


def test_inputs_that_the_program_refuses_are_refused_in_its_words(capfd: pytest.CaptureFixture[str]) -> None:
    linear = nn.Linear(4, 2)
    for args, kwargs, message in (
        ((torch.ones(3, 5),), {}, "Linear does not take these inputs: RuntimeError: "),
        ((), {}, r"missing a required argument: 'input'; it takes \(input"),
        ((torch.ones(3, 4),), {"other": 1}, "unexpected keyword argument 'other'"),
        ((torch.ones(3, 4).numpy(),), {}, r"args\[0\] is a numpy ndarray; give a tensor"),
    ):
        with pytest.raises(CaptureError, match=message):
            Precompile.dynamo(linear, *args, **kwargs)
    assert "Traceback" not in capfd.readouterr().err


def test_a_compiler_that_fails_is_the_cause_of_one_clear_error() -> None:
    def broken(graph: GraphModule, example_inputs: Sequence[Any]) -> Any:
        raise RuntimeError("out of registers")

    gm, _, guards, _ = Precompile.dynamo(lambda x: x + 1, torch.ones(2))
    with pytest.raises(CompileError, match=r"the compiler failed on .*: .*out of registers"):
        Precompile.aot_autograd(gm, guards, compiler=broken)
    with pytest.raises(InputError, match=r"guards are what Precompile\.dynamo returned, not a list"):
        Precompile.aot_autograd(gm, [])  # type: ignore[arg-type]


def test_a_marked_dimension_is_dynamic_within_its_guards() -> None:
    model = nn.Linear(4, 2)
    x = torch.randn(6, 4)
    torch._dynamo.mark_dynamic(x, 0)
    gm, _, guards, _ = Precompile.dynamo(model, x)
    compiled, _ = Precompile.aot_autograd(gm, guards, compiler=as_it_is)
    for size in (2, 5, 9):
        y = torch.randn(size, 4)
        torch.testing.assert_close(compiled((y,)), model(y))
    with pytest.raises(GuardError, match=r"2 <= .*size\(\)\[0\]"):
        compiled((torch.ones(1, 4),))


def test_a_compiler_that_fixes_a_marked_dimension_is_refused() -> None:
    def fixing(graph: GraphModule, example_inputs: Sequence[Any]) -> Any:
        size = next(value for value in example_inputs if isinstance(value, torch.SymInt))
        return graph if size == 6 else None

    gm, _, guards, _ = Precompile.dynamo(lambda x: x + 1, torch.randn(6, 4), dynamic={0: {0: "rows"}})
    with pytest.raises(
        UnsupportedError, match=r"args\[0\]\.size\(0\) was marked as dynamic, and the program or its compiler needs it"
    ):
        Precompile.aot_autograd(gm, guards, compiler=fixing)


@pytest.mark.parametrize("compiler", [as_it_is, pytest.param(None, marks=[pytest.mark.slow, pytest.mark.once])])
def test_what_a_compiler_assumes_of_sizes_is_checked_at_every_call(compiler: Any) -> None:
    def head(x: torch.Tensor) -> torch.Tensor:
        return (x * x)[:, :2].sum(0)

    gm, _, guards, _ = Precompile.dynamo(head, torch.randn(4, 6, requires_grad=True), dynamic=[{0: "rows", 1: (2, 16)}])
    compiled, _ = Precompile.aot_autograd(gm, guards, compiler=compiler)
    for rows, columns in ((4, 6), (9, 3), (2, 16)):
        x, y = (torch.arange(rows * columns).view(rows, columns).float().requires_grad_() for _ in range(2))
        compiled((x,)).sum().backward()
        head(y).sum().backward()
        assert torch.equal(x.grad, y.grad)
    with pytest.raises(GuardError, match=r"expected .* != .*, found s\d+ = args\[0\]\.size\(1\) = 2|size\(\)\[1\]"):
        compiled((torch.randn(4, 2, requires_grad=True),))


def test_a_model_with_an_input_of_the_name_dynamic_gets_it() -> None:
    def scaled(x: torch.Tensor, dynamic: float = 1.0) -> torch.Tensor:
        return x * dynamic

    gm, _, guards, inputs = Precompile.dynamo(scaled, torch.ones(3), dynamic=2.0)
    compiled, _ = Precompile.aot_autograd(gm, guards, compiler=as_it_is)
    assert compiled(inputs, dynamic=2.0).tolist() == [2.0, 2.0, 2.0]
