"""An artifact that is loaded in a fresh process computes what eager does, forward and backward, and compiles nothing."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from torchspan.artifacts import describe, load, precompile
from torchspan.core.errors import CaptureError, GuardError, InputError, UnsupportedError

# torch scripts a module of its own when inductor is first imported, and deprecated that
pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script(_method)?` is deprecated:DeprecationWarning")

FRESH = """
import os, sys, time
os.environ["PATH"] = ""  # no compiler can be called
import torch
import artifact_models as models
from torchspan.artifacts import load

for argument in sys.argv[1:]:
    name, path = argument.split("=")
    model, eager = getattr(models, name)(), getattr(models, name)()
    fast = load(path, model)
    found, expected = models.step(fast, model, name), models.step(eager, eager, name)
    # the mlp sums the gradients of outputs that are views of one another, in an order of its own
    exact = dict(rtol=0, atol=0) if "-eager" in path and name != "mlp" else dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, expected, **exact)
    again = models.step(fast, model, name)[1]
    torch.testing.assert_close(again, models.step(eager, eager, name)[1], **exact)
    with torch.no_grad():
        args, kwargs = models.inputs(name)
        torch.manual_seed(5)
        result = models.loss_of(fast(*args, **kwargs))
        torch.manual_seed(5)
        torch.testing.assert_close(result, models.loss_of(eager(*args, **kwargs)), **exact)
compilers = [name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor", "torch._functorch.aot"))]
assert not compilers, compilers
print("FINE", len(sys.argv) - 1)
"""


def test_a_fresh_process_trains_with_graphs_of_operators_bitwise(run_with_models: Callable, make: Callable[..., Path]) -> None:
    names = ("mlp", "cnn", "tied")
    process = run_with_models(FRESH, *(f"{name}={make(name)}" for name in names))
    assert "FINE 3" in process.stdout


@pytest.mark.slow
def test_a_fresh_process_trains_with_native_libraries_without_a_compiler(
    run_with_models: Callable, make: Callable[..., Path]
) -> None:
    process = run_with_models(FRESH, *(f"{name}={make(name, 'inductor')}" for name in ("mlp", "cnn")))
    assert "FINE 2" in process.stdout


@pytest.mark.once
def test_an_artifact_that_is_made_in_a_plain_process_loads_in_an_active_one_and_back(
    run_with_models: Callable, make: Callable[..., Path], tmp_path: Path
) -> None:
    within = tmp_path / "within-eager.tspan"
    code = """
    import sys, torch, artifact_models as models
    from torchspan.artifacts import precompile
    precompile(models.cnn(), *models.inputs("cnn"), compiler="eager").save(sys.argv[1])
    """
    run_with_models(code, str(within), env={"TORCHSPAN": "1"})
    assert "FINE 1" in run_with_models(FRESH, f"cnn={within}").stdout
    assert "FINE 1" in run_with_models(FRESH, f"cnn={make('cnn')}", env={"TORCHSPAN": "1"}).stdout


@pytest.mark.once
@pytest.mark.parametrize("is_on", [True, False])
def test_loading_leaves_the_garbage_collector_as_it_was(
    is_on: bool, models: types.ModuleType, make: Callable[..., Path]
) -> None:
    path = make("tied")
    (gc.enable if is_on else gc.disable)()
    try:
        load(path, models.Tied())
        assert gc.isenabled() is is_on
    finally:
        gc.enable()


def test_gradients_reach_the_weights_of_the_model_that_is_given(models: types.ModuleType, make: Callable[..., Path]) -> None:
    model = models.Tied()  # other weights than those that the artifact was made with
    actual = models.step(load(make("tied"), model), model, "tied")
    expected = models.step(model, model, "tied")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_outputs_that_are_views_or_inputs_are_so_again(models: types.ModuleType, make: Callable[..., Path]) -> None:
    args, kwargs = models.inputs("mlp")
    result, x = load(make("mlp"), models.mlp())(*args, **kwargs)
    assert x is args[0]
    assert result["parts"][0].data_ptr() == result["out"].data_ptr()
    assert result["parts"][1][1] == 7


def test_a_gradient_in_other_strides_than_were_compiled_is_taken(models: types.ModuleType, make: Callable[..., Path]) -> None:
    model = models.tied()
    args, _ = models.inputs("tied")
    gradient = torch.randn(11, 3, 2).permute(2, 1, 0)
    load(make("tied"), model)(*args).backward(gradient)
    result = model.embed.weight.grad.clone()
    model.zero_grad()
    model(*args).backward(gradient)
    torch.testing.assert_close(result, model.embed.weight.grad, rtol=0, atol=0)


def test_a_second_backward_and_a_double_backward_are_refused(models: types.ModuleType, make: Callable[..., Path]) -> None:
    model = models.tied()
    args, _ = models.inputs("tied")
    out = load(make("tied"), model)(*args).sum()
    out.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.backward()
    out = load(make("tied"), model)(*args).square().sum()
    (gradient,) = torch.autograd.grad(out, [model.embed.weight], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_model_in_evaluation_has_an_artifact_of_its_own(models: types.ModuleType, tmp_path: Path) -> None:
    model = models.cnn().eval()
    args, _ = models.inputs("cnn")
    with torch.inference_mode():
        fast = load(precompile(model, args, compiler="eager").save(tmp_path / "eval.tspan"), model)
        torch.testing.assert_close(fast(*args), model(*args), rtol=0, atol=0)
    with pytest.raises(GuardError, match="inference_mode is False, expected True"):
        fast(*args)


def test_a_function_is_precompiled_too(tmp_path: Path, models: types.ModuleType) -> None:
    x = torch.ones(3, requires_grad=True)
    y = torch.full((3,), 2.0, requires_grad=True)
    fast = load(precompile(models.dot, ([x, y],), compiler="eager").save(tmp_path / "f.tspan"), models.dot)
    fast([x, y]).backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 2.0))
    with pytest.raises(GuardError, match=r"args\[0\] has length 3, expected 2"):
        fast([x, y, y])


def test_making_an_artifact_runs_nothing_of_the_model(models: types.ModuleType) -> None:
    model = models.cnn()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    precompile(model, *models.inputs("cnn"), compiler="eager")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_artifact_holds_no_weights(models: types.ModuleType, make: Callable[..., Path]) -> None:
    weight = models.mlp().fc1.weight.detach().numpy().tobytes()
    assert weight[:16] not in make("mlp").read_bytes()
    zeros = models.mlp()
    for parameter in zeros.parameters():
        torch.nn.init.zeros_(parameter)
    artifact = precompile(zeros, *models.inputs("mlp"), compiler="eager")
    assert {name: data for name, data in artifact.payloads.items() if "plan" in name} == {
        name: data for name, data in _payloads(make("mlp")).items() if "plan" in name
    }


def _payloads(path: Path) -> dict[str, bytes]:
    from torchspan.artifacts.container import Store

    with Store(path) as store:
        return store.payloads()


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda models: (models.Counting(), torch.ones(2)),
            UnsupportedError,
            r"its forward changes 'calls' of L",
        ),
        (
            lambda models: (lambda x: x + 1 if x.sum() > 0 else x, torch.ones(2)),
            CaptureError,
            r"test_save_and_load.py:\d+: Data-dep",
        ),
        (lambda models: (lambda x: 3, torch.ones(2)), CaptureError, "does no work on tensors"),
        (lambda models: (lambda x: x.t_().add_(1), torch.ones(2, 3)), CaptureError, "inplace view on a graph input"),
        (lambda models: (models.parts, torch.ones(2).cfloat().requires_grad_()), UnsupportedError, "view of another type"),
    ],
    ids=["attribute", "branch", "nothing", "metadata", "dtype-view"],
)
def test_what_an_artifact_cannot_hold_is_refused_when_it_is_made(
    build: Callable, error: type[Exception], message: str, models: types.ModuleType
) -> None:
    target, x = build(models)
    with pytest.raises(error, match=message):
        precompile(target, (x,), compiler="eager")


def test_compilers_that_an_artifact_cannot_hold_are_refused(models: types.ModuleType) -> None:
    with pytest.raises(InputError, match="no compiler 'inducter' for an artifact; expected one of inductor"):
        precompile(models.modes(), *models.inputs("modes"), compiler="inducter")
    with pytest.raises(UnsupportedError, match=r"an artifact cannot hold what .* returns"):
        precompile(models.modes(), *models.inputs("modes"), compiler=lambda graph, example_inputs: graph)


def test_the_report_says_what_was_made_and_loaded(models: types.ModuleType, make: Callable[..., Path]) -> None:
    artifact = precompile(models.modes(), *models.inputs("modes"), compiler="eager")
    (attempt,) = artifact.report.attempts
    assert (attempt.strategy, attempt.backend, attempt.outcome) == ("artifact", "eager", "compiled") and attempt.seconds > 0
    (attempt,) = load(make("mlp"), models.mlp()).report.attempts
    assert attempt.outcome == "loaded"
    about = describe(make("mlp"))
    assert about["entries"]["compiler"] == "eager" and about["entries"]["state"]["fc1.weight"] == [
        [20, 10],
        "float32",
        "cpu",
    ]


@pytest.mark.slow
def test_a_regional_artifact_compiles_the_annotated_parts_only(run_with_models: Callable, make: Callable[..., Path]) -> None:
    from torchspan.backports._base import all_backports
    from torchspan.environment.scope import Environment

    with Environment([patch for backport in all_backports() for patch in backport.patches()]):
        path = make("annotated", "regional_inductor")
    ((program,), plan) = describe(path)["programs"], json.loads(_payloads(path)["entry0/plan.json"])
    kinds = [next(iter(step)) for step in plan["forward"]["steps"]]
    assert len(program["libraries"]) == 2 and "library" in kinds and "operator" in kinds
    # an old torch has the annotations with torchspan's environment only; an artifact may be made without it and used within
    assert "FINE 1" in run_with_models(FRESH, f"annotated={path}", env={"TORCHSPAN": "1"}).stdout


def test_what_was_loaded_is_not_copied_and_is_loaded_for_something_that_can_be_called(
    make: Callable[..., Path], models: types.ModuleType
) -> None:
    path, model = make("modes"), models.modes()
    for copies in (pickle.dumps, copy.deepcopy):
        with pytest.raises(UnsupportedError, match="cannot be copied or sent; load it again there"):
            copies(load(path, model))
    with pytest.raises(InputError, match="for a module or a function, not for a NoneType"):
        load(path, None)  # type: ignore[arg-type]
