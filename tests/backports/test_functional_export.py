"""dynamo_graph_capture_for_export: a graph with dynamo's metadata, in a module that is called as the program is."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from torchspan.backports._base import REGISTRY, is_lacking

pytestmark = [
    pytest.mark.usefixtures("environment"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
]

OURS = is_lacking(REGISTRY.get("functional_export").BACKPORT)


class Model(nn.Module):
    """State on two levels, an argument by name, one with a default, and a result that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("shift", torch.ones(3))
        self.factor = 7

    def forward(self, x: Tensor, *, mask: Tensor | None = None, flag: bool = True) -> dict[str, Any]:
        out = self.layer(x) + self.shift
        if flag:
            out = out.sin()
        return {"out": out if mask is None else out * mask, "factor": self.factor, "mask": mask}


def capture(target: Any, *args: Any, **kwargs: Any) -> Any:
    from torch._dynamo.functional_export import dynamo_graph_capture_for_export

    return dynamo_graph_capture_for_export(target)(*args, **kwargs)


def targets(module: Any) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op in ("call_function", "call_method")]


def test_the_captured_module_takes_and_returns_what_the_model_does() -> None:
    model, x, mask = Model(), torch.randn(2, 3), torch.rand(3)
    captured = capture(model, x, mask=mask)
    other_x, other_mask = torch.randn(2, 3), torch.rand(3)
    actual, expected = captured(other_x, mask=other_mask), model(other_x, mask=other_mask)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert actual["mask"] is other_mask
    actual["out"].sum().backward()
    gradient, model.layer.weight.grad = model.layer.weight.grad, None
    expected["out"].sum().backward()
    assert torch.equal(gradient, model.layer.weight.grad)


def test_it_has_the_models_state_and_dynamos_metadata() -> None:
    model = Model()
    captured = capture(model, torch.randn(2, 3))
    assert dict(captured.named_parameters()).keys() == {"layer.weight", "layer.bias"}
    assert captured.get_parameter("layer.weight") is model.layer.weight
    assert captured.shift is model.shift and captured.factor == 7
    placeholders = captured.graph.find_nodes(op="placeholder")
    assert len(placeholders) == 4 and all(isinstance(node.meta["val"], FakeTensor) for node in placeholders)
    linear = captured.graph.find_nodes(op="call_function", target=torch._C._nn.linear)[0]
    assert list(linear.meta["nn_module_stack"].values())[-1][1] is nn.Linear or "Linear" in str(linear.meta["nn_module_stack"])
    assert "out = self.layer(x)" in linear.meta["stack_trace"]
    assert captured.meta["tracing_context"].fake_mode is captured.meta["fake_mode"]


def test_what_is_swapped_in_by_functional_call_is_used() -> None:
    model, x = Model(), torch.randn(2, 3)
    captured = capture(model, x)
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    assert torch.equal(torch.func.functional_call(captured, state, (x,))["out"], torch.zeros(2, 3))


@pytest.mark.parametrize("kind", ["function", "closure", "method", "operator"])
def test_functions_methods_and_operators_can_be_captured(kind: str) -> None:
    shift = torch.ones(3)

    def function(a: Tensor, b: Tensor) -> tuple[Tensor, list[Tensor]]:
        return a.sin() + b, [b + 1]

    def closure(a: Tensor, b: Tensor) -> Tensor:
        return a * shift + b

    target = {"function": function, "closure": closure, "method": Model().forward, "operator": torch.ops.aten.add.Tensor}[kind]
    args = (torch.randn(3),) if kind == "method" else (torch.randn(3), torch.randn(3))
    if kind == "operator" and not OURS:
        pytest.skip("torch's own captures operators wrongly, or not at all")
    torch.testing.assert_close(capture(target, *args)(*args), target(*args), rtol=0, atol=0)


def test_hooks_are_part_of_the_graph_and_run_once() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3)
    model.register_forward_hook(lambda module, args, result: {"out": result * 2})
    model[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    captured = capture(model, x)
    torch.testing.assert_close(captured(x), model(x), rtol=0, atol=0)


def test_a_decorated_forward_keeps_its_annotations() -> None:
    from torch.fx.traceback import annotate_fn, preserve_node_meta

    model = Model()
    model.forward = annotate_fn({"part": "all"})(functools.partial(Model.forward, model))
    with preserve_node_meta():
        captured = capture(model, torch.randn(2, 3))
    sine = next(node for node in captured.graph.nodes if node.target == "sin")
    assert sine.meta["custom"] == {"part": "all"}


def test_changes_to_python_objects_are_left_out_with_a_warning() -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x.sin()

    model = Counting()
    with pytest.warns(UserWarning, match=r"L\['self'\]"):
        captured = capture(model, torch.ones(2))
    assert torch.equal(captured(torch.ones(2)), torch.ones(2).sin())
    assert model.calls == 0


def test_an_interpreter_takes_the_arguments_of_the_program() -> None:
    model, x, mask = Model(), torch.randn(2, 3), torch.rand(3)
    captured = capture(model, x, mask=mask)
    result = torch.fx.Interpreter(captured).run(x, mask)
    torch.testing.assert_close(result, model(x, mask=mask), rtol=0, atol=0)


def test_a_dynamic_dimension_stays_one() -> None:
    x = torch.randn(4, 3)
    torch._dynamo.mark_dynamic(x, 0)
    captured = capture(Model(), x)
    assert captured(torch.randn(9, 3))["out"].shape == (9, 3)
    sizes = {str(node.meta["val"].shape[0]) for node in captured.graph.find_nodes(op="placeholder")}
    assert any(not size.isdigit() for size in sizes), sizes


def test_what_is_no_graph_is_refused() -> None:
    def branches(x: Tensor) -> Tensor:
        return x.sin() if x.sum() > 0 else x

    with pytest.raises(torch._dynamo.exc.Unsupported, match="Data-dependent"):
        capture(branches, torch.ones(2))
    with pytest.raises(AssertionError):
        capture(lambda x: 3, torch.ones(2))
    if OURS:
        with pytest.raises(torch._dynamo.exc.UserError, match="an example argument holds a object"):
            capture(lambda x, y: x.sin(), torch.ones(2), object())
        with pytest.raises(RuntimeError, match="has no Python code to capture"):
            capture(len, torch.ones(2))
