"""Dynamic sizes in artifacts: one entry serves all sizes that its conditions allow, and refuses the others by name."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchspan.artifacts import load, precompile
from torchspan.artifacts.size_conditions import Expression
from torchspan.core.errors import CaptureError, GuardError, InputError, IntegrityError, UnknownNameError, UnsupportedError
from torchspan.core.report import Report

# torch scripts a module of its own when inductor is first imported, and deprecated that
pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script(_method)?` is deprecated:DeprecationWarning")


class Attention(nn.Module):
    """Views, slices, sizes in arithmetic and in the result, an output that is a view of an input."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.register_buffer("places", torch.randn(32, 4))

    def forward(self, x: Tensor, extra: dict[str, Any] | None = None) -> Any:
        if x.shape[0] > 100:
            x = x * 2
        batch, steps, _ = x.shape
        h = (self.proj(x) + self.places[:steps]).view(batch, steps, 2, 2).transpose(1, 2)
        scores = torch.softmax(h @ h.transpose(-1, -2) * steps**-0.5, -1)
        out = (scores @ h).transpose(1, 2).reshape(batch, steps, 4)
        if extra is not None:
            out = out + extra["bias"][0]
        return {"out": out, "sum": h.sum((1, 2, 3)) * batch, "view": x.transpose(0, 1), "steps": steps, "twice": 2 * steps + 1}


def step(call: Any, model: nn.Module, x: Tensor) -> tuple[Any, list[Tensor]]:
    """Results, and the gradients of the input and all parameters."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    result = call(x)
    weights = torch.arange(result["out"].numel()).view_as(result["out"]).sin()
    ((result["out"] * weights).sum() + result["sum"].sum() / 100 + (result["view"] ** 2).sum()).backward()
    return result, [x.grad, *(p.grad.clone() for p in model.parameters())]


def made(compiler: str, tmp_path: Path, dynamic: Any) -> tuple[Attention, Any]:
    torch.manual_seed(0)
    model = Attention()
    example = torch.randn(3, 5, 4, requires_grad=True)
    artifact = precompile(model, (example,), compiler=compiler, dynamic=dynamic)
    assert not hasattr(example, "_dynamo_dynamic_indices") and artifact.entries["format"] == 2
    return model, load(artifact.save(tmp_path / "model.tspan"), model)


@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_entry_serves_all_sizes_forward_and_backward(compiler: str, tmp_path: Path) -> None:
    model, fast = made(compiler, tmp_path, {"x": {0: "batch", 1: (2, 32)}})
    for shape in ((3, 5, 4), (7, 6, 4), (2, 32, 4), (99, 3, 4)):
        x = torch.randn(shape)
        (actual, gradients), (expected, expected_gradients) = step(fast, model, x), step(model, model, x)
        assert (actual["steps"], actual["twice"]) == (shape[1], 2 * shape[1] + 1)
        assert actual["view"].stride() == expected["view"].stride()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(fast(x.requires_grad_()), model(x), rtol=1e-5, atol=1e-5)
    for shape, message in (
        ((3, 33, 4), r"s\d+ <= 32, found s\d+ = args\[0\]\.size\(1\) = 33"),
        ((101, 5, 4), r"s\d+ <= 100, found s\d+ = args\[0\]\.size\(0\) = 101"),
        ((1, 5, 4), r"expected 2 <= s\d+"),
        ((3, 5, 5), r"has shape \[3, 5, 5\] \(expected \[any, any, 4\]\)"),
        ((3, 5), r"has shape \[3, 5\]"),
    ):
        with pytest.raises(GuardError, match=message):
            fast(torch.randn(shape, requires_grad=True))
    with pytest.raises(GuardError, match="has stride"):
        fast(torch.randn(4, 5, 3, requires_grad=True).transpose(0, 2))


def test_what_a_compiler_assumes_of_sizes_is_a_guard_too(tmp_path: Path) -> None:
    class Head(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * x)[:, :2]  # all of x where there are two columns: AOTAutograd asks

    head = Head()
    artifact = precompile(head, (torch.randn(4, 6, requires_grad=True),), compiler="eager", dynamic={0: {1}})
    fast = load(artifact.save(tmp_path / "head.tspan"), head)
    conditions = json.loads(artifact.payloads["entry0/guards.json"])["sizes"]["conditions"]
    for columns in (2, 3, 6, 9):
        x = torch.randn(4, columns, requires_grad=True)
        try:
            result = fast(x)
        except GuardError:
            assert columns == 2 and any("!=" in condition for condition in conditions)
        else:
            assert torch.equal(result, head(x)) and result.is_contiguous() == head(x).is_contiguous()


def test_sizes_that_must_be_equal_are_held_equal_and_containers_are_followed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = Attention(), torch.export.Dim("batch", min=2, max=50)
    x, extra = torch.randn(3, 7, 4), {"bias": [torch.randn(3, 7, 4)]}
    spec = {"x": {0: batch, 1: "steps"}, "extra": {"bias": [{0: batch, 1: "steps"}]}}
    fast = load(precompile(model, (x,), {"extra": extra}, compiler="eager", dynamic=spec).save(tmp_path / "m.tspan"), model)
    x, extra = torch.randn(9, 4, 4), {"bias": [torch.randn(9, 4, 4)]}
    torch.testing.assert_close(fast(x, extra=extra), model(x, extra=extra), rtol=1e-5, atol=1e-5)
    with pytest.raises(GuardError, match=r"expected s\d+ == s\d+, found s\d+ = "):
        fast(x, extra={"bias": [torch.randn(9, 5, 4)]})


def test_every_dimension_that_the_program_leaves_free_is_dynamic_on_request(tmp_path: Path) -> None:
    model, fast = made("eager", tmp_path, True)
    x = torch.randn(6, 11, 4)
    torch.testing.assert_close(step(fast, model, x)[1], step(model, model, x)[1], rtol=1e-4, atol=1e-4)
    with pytest.raises(GuardError, match=r"has shape .*any, any, 4"):
        fast(torch.randn(6, 11, 8, requires_grad=True))


def test_a_mark_of_dynamo_counts_and_static_entries_stay_beside_dynamic_ones(tmp_path: Path) -> None:
    linear, marked = nn.Linear(4, 3), torch.randn(6, 4)
    torch._dynamo.mark_dynamic(marked, 0)
    artifact = precompile(linear, (torch.randn(1, 4),), compiler="eager")
    assert artifact.entries["format"] == 1
    artifact.add(linear, (marked,))
    assert artifact.entries["format"] == 2 and hasattr(marked, "_dynamo_dynamic_indices")
    fast = load(artifact.save(tmp_path / "linear.tspan"), linear)
    for rows in (1, 2, 17):
        x = torch.randn(rows, 4)
        assert torch.equal(fast(x), linear(x))


@pytest.mark.parametrize(
    ("dynamic", "error", "message"),
    [
        ({"y": {0: "b"}}, UnknownNameError, "no input 'y'.*by position or by name"),
        ({"x": {5: "b"}}, InputError, "dimension 5 of input 'x', which has 3"),
        ({"x": {0: (8, 9)}}, InputError, "size 3 in the example, outside of 8 to 9"),
        ({"x": 7}, InputError, "expected its dimensions"),
        (3, InputError, "expected True, a mapping"),
        ({0: {0: "a", 2: "b"}}, CaptureError, r"cannot be captured for any args\[0\]\.size\(2\): it works for 4 only"),
    ],
)
def test_what_cannot_be_dynamic_is_said_before_anything_is_compiled(dynamic: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        precompile(Attention(), (torch.randn(3, 5, 4),), compiler="eager", dynamic=dynamic)
    with pytest.raises(InputError, match="has size 1 in the example"):
        precompile(nn.Linear(4, 3), (torch.randn(1, 4),), compiler="eager", dynamic={0: {0: "batch"}})


def test_a_number_in_the_result_that_may_be_a_size_is_refused_unless_the_graph_computes_it() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x + 1, 6

    with pytest.raises(UnsupportedError, match="cannot tell whether the number 6 that Odd returns is a dynamic size"):
        precompile(Odd(), (torch.randn(6, 4),), compiler="eager", dynamic={0: {0: "batch"}})


@pytest.mark.once
@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "s0.__class__",
        "(lambda: 1)()",
        "math.factorial(9)",
        "s0 ** s1",
        "9**9**9",
        "[1][0]",
        "'a' * s0",
        "s0 :=",
        "",
    ],
)
def test_an_expression_of_a_file_is_arithmetic_or_refused(text: str) -> None:
    with pytest.raises(IntegrityError, match="which is not one over sizes"):
        Expression.of(text)


@pytest.mark.slow
@pytest.mark.once
def test_a_fresh_process_serves_new_sizes_without_a_compiler(
    run_with_models: Callable[..., Any], models: types.ModuleType, tmp_path: Path
) -> None:
    model = models.MLP()
    artifact = precompile(model, (torch.randn(4, 10),), dynamic={"x": {0: "batch"}})
    path = artifact.save(tmp_path / "mlp.tspan")
    code = """
    import os, sys, torch, artifact_models as models
    os.environ["PATH"] = ""
    from torchspan.artifacts import load
    model = models.MLP()
    fast = load(sys.argv[1], model)
    for batch in (2, 4, 33):
        x = torch.randn(batch, 10)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    loaded = [name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor", "sympy"))]
    print("FINE", [name for name in loaded if not name.startswith("sympy")])
    """
    assert "FINE []" in run_with_models(code, str(path)).stdout


# passes


def test_passes_change_the_graphs_before_they_are_compiled_and_are_in_the_manifest(tmp_path: Path) -> None:
    def halve(gm: torch.fx.GraphModule) -> None:
        for node in gm.graph.nodes:
            if node.target is torch.ops.aten.mul.Tensor and node.args[1] == 2:
                node.args = (node.args[0], 0.5)

    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    report = Report()
    artifact = precompile(Double(), (torch.ones(3, requires_grad=True),), compiler="eager", passes=[halve], report=report)
    fast, x = load(artifact.save(tmp_path / "double.tspan"), Double()), torch.ones(3, requires_grad=True)
    fast(x).sum().backward()
    assert fast(x).tolist() == [0.5, 0.5, 0.5] and x.grad.tolist() == [0.5, 0.5, 0.5]
    assert artifact.entries["passes"] == [f"{__name__}:{halve.__qualname__}"]
    assert [decision.subject for decision in report.decisions if decision.topic == "pass"] == ["forward", "backward"]
    artifact.add(Double(), (torch.ones(5, requires_grad=True),))
    assert sum(decision.count for decision in report.decisions if decision.topic == "pass") == 4


def test_passes_that_an_artifact_cannot_take_are_refused() -> None:
    for passes, message in (
        ("nothing", "no pass 'nothing'"),
        ("regional_inductor", "say compiler='regional_inductor'"),
        ([3], "not a int"),
    ):
        with pytest.raises(InputError, match=message):
            precompile(nn.Linear(2, 2), (torch.ones(1, 2),), compiler="eager", passes=passes)  # type: ignore[arg-type]
