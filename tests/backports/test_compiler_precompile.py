"""``torch.compiler.precompile``: one call captured ahead of time, loaded elsewhere; torch's own where it has it, else ours."""

from __future__ import annotations

import subprocess
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchspan.artifacts import diff
from torchspan.artifacts.container import Store, write_artifact
from torchspan.artifacts.manifest import values_of, write_manifest
from torchspan.backports._base import get_backport, is_lacking
from torchspan.core.errors import GuardError, UnsupportedError
from torchspan.core.report import current_report
from torchspan.environment.scope import Environment

pytestmark = [
    pytest.mark.usefixtures("environment"),
    # torch scripts a module of its own when inductor is first imported, and deprecated that
    pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script(_method)?` is deprecated:DeprecationWarning"),
]

IS_OURS = is_lacking(get_backport("compiler_precompile"))
ours_only = pytest.mark.skipif(not IS_OURS, reason="torch's own does not do this")

Pair = namedtuple("Pair", ["first", "second"])


class Net(nn.Module):
    """Tied weights, a buffer that changes in training, and a part that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.norm = nn.BatchNorm1d(6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(tokens))
        return self.head(self.mix(self.mix(x).relu()))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def tokens() -> torch.Tensor:
    return torch.arange(5) % 7


def step(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    loss = nn.functional.cross_entropy(model(x), target)
    loss.backward()
    return loss.detach()


def infer(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)


class Precompiled:
    """Captures, each in two files of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0

    def paths(self) -> dict[str, Path]:
        self.number += 1
        return {"artifact_path": self.folder / f"new/{self.number}.py", "cache_path": self.folder / f"{self.number}.cache"}

    def __call__(self, function: Callable[..., Any], *args: Any, backend: str = "eager") -> tuple[Any, Any]:
        """The result of the captured call, and the callable that is loaded."""
        paths = self.paths()
        with torch.compiler.precompile.capture(function, **paths, backend=backend) as captured:
            result = captured(*args)
        return result, torch.compiler.precompile.load(**paths)


@pytest.fixture
def precompiled(tmp_path: Path) -> Precompiled:
    return Precompiled(tmp_path)


def test_a_call_is_captured_and_computes_what_eager_does_for_other_weights(precompiled: Precompiled) -> None:
    model, eager = net(), net()
    result, fast = precompiled(infer, model, tokens())
    torch.testing.assert_close(result, infer(eager, tokens()), rtol=0, atol=1e-6)
    assert not result.requires_grad
    torch.testing.assert_close(model.state_dict(), eager.state_dict(), rtol=0, atol=1e-6)  # buffers changed once
    other, eager = net(1), net(1)
    torch.testing.assert_close(fast(other, tokens()), infer(eager, tokens()), rtol=0, atol=1e-6)
    torch.testing.assert_close(other.state_dict(), eager.state_dict(), rtol=0, atol=1e-6)
    assert isinstance(fast, torch.compiler.precompile.PrecompiledRunnable)
    assert fast.installed is False
    with fast as entered:
        assert entered is fast


def test_a_training_step_leaves_the_gradients_of_eager_and_adds_to_those_that_are_there(precompiled: Precompiled) -> None:
    model, eager = net(), net()
    _, fast = precompiled(step, model, tokens(), tokens())
    model = net()
    for function, trained in ((fast, model), (step, eager)):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        trained.losses = []
        for number in range(3):
            trained.losses.append(function(trained, tokens(), tokens()))
            function(trained, tokens(), tokens())  # gradients of two calls add up
            if number < 2:
                optimizer.step()
                optimizer.zero_grad()
    torch.testing.assert_close(model.losses, eager.losses, rtol=1e-5, atol=1e-6)
    for (name, actual), expected in zip(model.named_parameters(), eager.parameters()):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-5, atol=1e-6, msg=name)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():  # the mode of the caller does not count
        assert fast(net(), tokens(), tokens()) is not None


def test_gradients_go_to_parameters_that_took_part_and_not_to_frozen_ones(precompiled: Precompiled) -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    first.bias.requires_grad_(False)
    x = torch.ones(2, 3)
    precompiled(lambda a, b, x: (a(x) * b.weight.sum()).sum().backward(), first, second, x)
    assert first.weight.grad is not None
    assert second.weight.grad is not None
    assert first.bias.grad is None
    assert second.bias.grad is None


def test_a_capture_holds_the_casts_that_it_was_made_with(precompiled: Precompiled) -> None:
    linear, x = nn.Linear(3, 2), torch.ones(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        expected = linear(x)
        result, fast = precompiled(infer, linear, x)
        inside = fast(linear, x)
    for actual in (result, inside, fast(linear, x)):
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual, expected.detach())


def test_containers_come_and_go_as_they_are(precompiled: Precompiled) -> None:
    def function(model: nn.Module, inputs: dict[str, Any], flag: bool) -> Any:
        inputs["b"][0].add_(1)
        out = model(inputs["a"])
        return {"out": (out, [out.sum(), 3, None]), "b": inputs["b"][0], "flag": flag}

    linear, x, y = nn.Linear(3, 2), torch.ones(4, 3), torch.zeros(2)
    _, fast = precompiled(function, linear, {"a": x, "b": [y]}, True)
    assert y.tolist() == [1, 1]  # the captured call was made once
    result = fast(linear, {"a": x, "b": [y]}, True)
    assert y.tolist() == [2, 2]
    assert result["b"] is y
    torch.testing.assert_close(result["out"][0], linear(x).detach())
    assert result["out"][1][1:] == [3, None]
    assert result["flag"] is True
    with pytest.raises(torch.compiler.PrecompileError):
        fast(linear, {"a": x, "b": [y, y]}, True)


def test_a_call_of_another_shape_dtype_number_or_model_is_refused(precompiled: Precompiled) -> None:
    linear, x = nn.Linear(3, 2), torch.ones(4, 3)
    _, fast = precompiled(infer, linear, x)
    for args in (
        (linear, torch.ones(5, 3)),
        (linear, x.double()),
        (linear,),
        (x, linear),
        (nn.Linear(3, 2, bias=False), x),
        (nn.Linear(3, 5), x),
        (nn.Linear(3, 2).double(), x),
    ):
        with pytest.raises(torch.compiler.PrecompileError):
            fast(*args)
    with pytest.raises(TypeError):
        fast(linear, x=x)


def test_a_capture_takes_one_call_inside_its_block(precompiled: Precompiled) -> None:
    precompile, error = torch.compiler.precompile, torch.compiler.PrecompileError
    linear, x, paths = nn.Linear(3, 2), torch.ones(4, 3), precompiled.paths()
    captured = precompile.capture(infer, **paths, backend="eager")
    assert isinstance(captured, precompile.Capture)
    for too_early in (lambda: captured(linear, x), captured.save):
        with pytest.raises(error):
            too_early()
    with captured:
        with pytest.raises(error):
            captured.save()
        with pytest.raises(ValueError, match="positional"):
            captured(linear, x=x)
        captured(linear, x)
        with pytest.raises(error):
            captured(linear, x)
        captured.save()
        assert paths["artifact_path"].exists()
    for too_late in (lambda: captured(linear, x), captured.save, captured.__enter__):
        with pytest.raises(error):
            too_late()


def test_a_block_without_a_call_or_with_an_error_writes_nothing(precompiled: Precompiled) -> None:
    linear, x, paths = nn.Linear(3, 2), torch.ones(4, 3), precompiled.paths()
    with (
        pytest.raises(torch.compiler.PrecompileError),
        torch.compiler.precompile.capture(infer, **paths),
    ):
        pass
    captured = torch.compiler.precompile.capture(infer, **paths, backend="eager")
    captured.__enter__()
    captured(linear, x)
    captured.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert not any(path.exists() for path in paths.values())


def test_other_tracers_backends_and_functions_with_bound_arguments_are_refused(precompiled: Precompiled) -> None:
    from functools import partial

    capture, paths = torch.compiler.precompile.capture, precompiled.paths()
    with pytest.raises(TypeError):
        capture(infer, **paths, tracer="dynamo")
    with pytest.raises(ValueError, match="backend"):
        capture(infer, **paths, backend="other")
    with pytest.raises(TypeError):
        capture(partial(infer, nn.Linear(3, 2)), **paths)


def test_what_a_capture_cannot_follow_is_refused(precompiled: Precompiled) -> None:
    linear, x, held = nn.Linear(3, 2), torch.ones(4, 3), torch.ones(2)
    marked = torch.ones(4, 3)
    torch._dynamo.mark_dynamic(marked, 0)
    for function, inputs in (
        (lambda model, x: model(x) + held, x),  # a tensor that is not an argument
        (lambda model, x: model(x) + torch.tensor([1.0, 2.0]), x),
        (lambda model, x: model(x).sum().backward(), x.clone().requires_grad_()),  # a gradient of an input
        (infer, marked),
    ):
        with pytest.raises(torch.compiler.PrecompileError):
            precompiled(function, linear, inputs)
    with pytest.raises(RuntimeError):
        precompiled(lambda model, x: model(x) * x.sum().item(), linear, x)
    assert linear.weight.grad is None


def test_decompositions_of_the_tracer_are_applied(precompiled: Precompiled) -> None:
    shapes = []

    def silu(x: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        return x * x.sigmoid()

    tracer = torch.compiler.precompile.MakeFxTracer({torch.ops.aten.silu.default: silu})
    with torch.compiler.precompile.capture(
        lambda x: nn.functional.silu(x), **precompiled.paths(), tracer=tracer, backend="eager"
    ) as captured:
        x = torch.ones(3)
        torch.testing.assert_close(captured(x), nn.functional.silu(x))
    assert shapes == [(3,)]


def test_files_that_are_missing_or_not_a_pair_are_refused(precompiled: Precompiled) -> None:
    precompile, error = torch.compiler.precompile, torch.compiler.PrecompileError
    linear, x = nn.Linear(3, 2), torch.ones(4, 3)
    precompiled(infer, linear, x)
    precompiled(lambda model, x: model(x) + 1, linear, x)
    first, second = ((precompiled.folder / f"new/{n}.py", precompiled.folder / f"{n}.cache") for n in (1, 2))
    source = precompiled.folder / "source.py"
    source.write_text("raise SystemExit('this was executed')\n")
    for pair in (
        (precompiled.folder / "none", first[1]),
        (first[0], precompiled.folder / "none"),
        (first[0], second[1]),
        (source, first[1]),
        (first[1], first[0]),
    ):
        with pytest.raises(error):
            precompile.load(*pair)


def test_a_summary_counts(environment: Environment) -> None:
    summary = torch.compiler.precompile.PrecompileSummary(
        frames=1, resume_functions=0, guarded_codes=1, backend_graphs=1, kept_guards=(("A", "x"), ("A", "y"))
    )
    assert summary.complete
    assert summary.kept_guard_types == {"A": 2}
    assert not torch.compiler.precompile.PrecompileSummary(
        frames=1, resume_functions=0, guarded_codes=1, backend_graphs=1, bypassed=("f",)
    ).complete


PROGRAM = """
import sys
import torch
from torch.compiler.precompile import capture, load
from torch.compiler import PrecompileError

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
x, target = torch.ones(4, 3), torch.zeros(4, 2)

def step(model, x, target):
    loss = (model(x) - target).square().mean()
    loss.backward()
    return loss

if sys.argv[1] == "capture":
    with capture(step, artifact_path="step.py", cache_path="step.cache", backend=sys.argv[2]) as captured:
        loss = captured(model, x, target)
else:
    loss = load("step.py", "step.cache")(model, x, target)
gradients = [parameter.grad.clone() for parameter in model.parameters()]
model.zero_grad()
torch.testing.assert_close(loss, step(model, x, target).detach())
torch.testing.assert_close(gradients, [parameter.grad for parameter in model.parameters()])
compilers = [name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor", "torch._functorch.aot"))]
print("FINE", "no compiler" if not compilers else "compilers")
"""


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.once])])
def test_a_program_runs_unmodified_and_its_artifact_compiles_nothing_in_a_fresh_process(
    run_python: Callable[..., subprocess.CompletedProcess[str]], backend: str
) -> None:
    env = {"TORCHSPAN": "1"}
    assert "FINE" in run_python(PROGRAM, "capture", backend, env=env).stdout
    output = run_python(PROGRAM, "load", env=env | ({"PATH": ""} if IS_OURS else {})).stdout
    assert ("FINE no compiler" if IS_OURS else "FINE") in output


# what torch's own does not do


@ours_only
def test_modes_constants_strides_and_code_are_guarded(precompiled: Precompiled) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    x = torch.ones(4, 3)
    _, fast = precompiled(lambda model, x, scale: model(x) * scale, model, x, 2.0)
    model.eval()
    with pytest.raises(GuardError, match=r"args\[0\]._modules\['1'\].training is False, expected True"):
        fast(model, x, 2.0)
    model.train()
    with pytest.raises(GuardError, match=r"args\[2\] is 3.0, expected 2.0"):
        fast(model, x, 3.0)
    with pytest.raises(torch.compiler.PrecompileError, match=r"args\[1\] has stride \[1, 4\] \(expected \[3, 1\]\)"):
        fast(model, torch.ones(3, 4).t(), 2.0)
    model[1] = nn.Tanh()
    with pytest.raises(GuardError, match="is a Tanh, expected a Dropout"):
        fast(model, x, 2.0)


@ours_only
def test_a_model_may_be_frozen_and_in_another_mode_where_that_changes_nothing(precompiled: Precompiled) -> None:
    linear, x = nn.Linear(3, 2), torch.ones(4, 3)
    result, fast = precompiled(infer, linear, x)
    frozen = linear.requires_grad_(False).eval()
    torch.testing.assert_close(fast(frozen, x), result)


@ours_only
def test_any_named_tuple_comes_back(precompiled: Precompiled) -> None:
    result, fast = precompiled(lambda x: Pair(x + 1, 1.5), torch.ones(2))
    for actual in (result, fast(torch.ones(2))):
        assert type(actual) is Pair
        assert actual.first.tolist() == [2, 2]
        assert actual.second == 1.5


@ours_only
def test_random_numbers_are_those_of_eager(precompiled: Precompiled) -> None:
    x = torch.ones(100)
    torch.manual_seed(5)
    expected = [nn.functional.dropout(x) for _ in range(2)]
    torch.manual_seed(5)
    result, fast = precompiled(lambda x: nn.functional.dropout(x), x)
    torch.testing.assert_close([result, fast(x)], expected, rtol=0, atol=0)


@ours_only
def test_what_is_not_carried_is_unsupported_and_says_what_to_do(precompiled: Precompiled) -> None:
    x = torch.ones(4, 3)
    torch._dynamo.decorators.mark_unbacked(x, 0)
    with pytest.raises(UnsupportedError, match=r"mark_unbacked.*since 2\.15\.0\. Capture once for each size"):
        precompiled(infer, nn.Linear(3, 2), x)
    with pytest.raises(UnsupportedError, match="plain, dense tensors"):
        precompiled(infer, nn.Linear(3, 2), torch.eye(3).to_sparse())


@ours_only
@pytest.mark.parametrize("path", [[["local", "args"], ["item", 0], ["attr", "_parameters"]], [["local", "args"]], "weight"])
def test_a_file_that_gives_gradients_to_what_is_no_parameter_is_refused(precompiled: Precompiled, path: Any) -> None:
    precompiled(lambda model, x: model(x).sum().backward(), nn.Linear(3, 2), torch.ones(4, 3))
    file, pair = precompiled.folder / "new/1.py", precompiled.folder / "1.cache"
    with Store(file) as store:
        manifest, payloads = store.manifest, store.payloads()
    entries = {**values_of(manifest), "gradients": [path] * 2}
    write_artifact(file, write_manifest(entries, payloads, manifest["programs"]), payloads)
    pair.write_text("{}")  # says nothing of the first file
    with pytest.raises(torch.compiler.PrecompileError, match=r"gives gradients to what is no parameter|cannot be followed"):
        torch.compiler.precompile.load(file, pair)


@ours_only
def test_its_file_is_an_artifact_that_can_be_looked_into(precompiled: Precompiled) -> None:
    x = torch.ones(4, 3)
    precompiled(infer, nn.Linear(3, 2), x)
    precompiled(infer, nn.Linear(3, 2), x)
    environment_report = current_report()
    assert environment_report is not None
    outcomes = [attempt.outcome for attempt in environment_report.attempts]
    assert outcomes == ["compiled", "loaded"] * 2
    assert diff(precompiled.folder / "new/1.py", precompiled.folder / "new/2.py") == {"entries": {}, "payloads": {}}
