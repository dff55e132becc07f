"""An artifact is used for what it was made for, and for nothing else; what does not fit is named."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from torchspan.artifacts import load
from torchspan.capture.dynamo import capture_dynamo
from torchspan.core.errors import GuardError, ManifestMismatchError
from torchspan.core.program import Program


def change_global(model: Any, models: Any) -> None:
    models.SCALE = 3.0


def change_attribute(model: Any, models: Any) -> None:
    model.bias = False


def change_item(model: Any, models: Any) -> None:
    model.settings["power"] = 3


def change_type_of_constant(model: Any, models: Any) -> None:
    model.settings["power"] = 2.0


def replace_layer(model: Any, models: Any) -> None:
    model.fc1 = torch.nn.Sequential(model.fc1, torch.nn.Tanh())


def freeze(model: Any, models: Any) -> None:
    model.fc1.weight.requires_grad_(False)


def change_dtype(model: Any, models: Any) -> None:
    model.double()


def hook_on_a_layer(model: Any, models: Any) -> None:
    model.fc2.register_forward_hook(lambda module, args, output: output * 2)


def hook_on_the_model(model: Any, models: Any) -> None:
    model.register_forward_pre_hook(lambda module, args: None)


def backward_hook(model: Any, models: Any) -> None:
    model.fc2.register_full_backward_hook(lambda module, inputs, outputs: None)


def forward_of_its_own(model: Any, models: Any) -> None:
    model.fc2.forward = lambda x: x[:, :5]


def tie(model: Any, models: Any) -> None:
    model.fc1.weight = torch.nn.Parameter(torch.zeros(20, 10))
    model.fc2.bias = torch.nn.Parameter(model.fc1.bias.detach()[:5])
    model.fc2.weight = torch.nn.Parameter(model.fc1.weight.detach().view(5, 40)[:, :20])


CHANGES: dict[Callable[[Any, Any], None], str] = {
    change_global: r"SCALE is 3.0, expected 2.0",
    change_attribute: r"target.bias is False, expected True",
    change_item: r"target.settings\['power'\] is 3, expected 2",
    change_type_of_constant: r"target.settings\['power'\] is 2.0, expected 2",
    replace_layer: r"target._modules\['fc1'\] is a torch.nn.modules.container:Sequential",
    freeze: r"\['weight'\] has requires_grad False \(expected True\)",
    change_dtype: r"has dtype torch.float64 \(expected torch.float32\)",
    hook_on_a_layer: r"target._modules\['fc2'\]._forward_hooks has length 1, expected 0",
    hook_on_the_model: r"target._forward_pre_hooks has length 1, expected 0",
    backward_hook: r"_backward_hooks has length 1, expected 0",
    forward_of_its_own: r"target._modules\['fc2'\] has an attribute 'forward' of its own",
    tie: r"has stride \[40, 1\] \(expected \[20, 1\]\)",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_program_is_refused_by_the_guard_that_names_it(
    change: Callable[[Any, Any], None], models: types.ModuleType, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.mlp()
    args, kwargs = models.inputs("mlp")
    fast = load(make("mlp"), model)
    fast(*args, **kwargs)
    monkeypatch.setattr(models, "SCALE", models.SCALE)
    change(model, models)
    with pytest.raises(GuardError, match=CHANGES[change]):
        fast(*args, **kwargs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m: ((x[:3],), {"mask": m}), r"args\[0\] has shape \[3, 10\] \(expected \[4, 10\]\)"),
        (lambda x, m: ((x.double(),), {"mask": m}), r"args\[0\] has dtype torch.float64 \(expected torch.float32\)"),
        (lambda x, m: ((x.t().contiguous().t(),), {"mask": m}), r"args\[0\] has stride \[1, 4\] \(expected \[10, 1\]\)"),
        (lambda x, m: ((x.to("meta"),), {"mask": m}), r"args\[0\] has device meta \(expected cpu\)"),
        (lambda x, m: ((x.clone().requires_grad_(),), {"mask": m}), r"requires_grad True \(expected False\)"),
        (lambda x, m: ((torch.nn.Parameter(x, False),), {"mask": m}), r"expected a Tensor, found a Parameter"),
        (lambda x, m: ((x,), {}), r"kwargs has the keys \[\], expected \['mask'\]"),
        (lambda x, m: ((x, m), {}), r"args has length 2, expected 1"),
        (lambda x, m: (([x],), {"mask": m}), r"args\[0\] expected a Tensor, found a list"),
    ],
)
def test_other_inputs_are_refused_by_the_guard_that_names_them(
    call: Callable, message: str, models: types.ModuleType, make: Callable[..., Path]
) -> None:
    args, kwargs = models.inputs("mlp")
    fast = load(make("mlp"), models.mlp())
    other_args, other_kwargs = call(args[0], kwargs["mask"])
    with pytest.raises(GuardError, match=message):
        fast(*other_args, **other_kwargs)


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        (lambda: torch.autocast("cpu"), "autocast is {'cpu': 'torch.bfloat16'}, expected {}"),
        (lambda: torch.device("meta"), "torch_function_modes is ['torch.utils._device:DeviceContext meta'], expected []"),
        (torch.inference_mode, "inference_mode is True, expected False"),
        (lambda: torch.utils.flop_counter.FlopCounterMode(display=False), "dispatch_modes is 1, expected 0"),
    ],
    ids=["autocast", "device", "inference", "mode"],
)
def test_another_state_of_torch_is_refused(
    scope: Callable, message: str, models: types.ModuleType, make: Callable[..., Path]
) -> None:
    args, kwargs = models.inputs("mlp")
    fast = load(make("mlp"), models.mlp())
    with scope(), pytest.raises(GuardError) as error:
        fast(*args, **kwargs)
    assert message in str(error.value)


def test_a_program_that_asks_for_the_grad_mode_is_held_to_it(models: types.ModuleType, make: Callable[..., Path]) -> None:
    model = models.modes()
    args, _ = models.inputs("modes")
    fast = load(make("modes"), model)
    torch.testing.assert_close(fast(*args), model(*args))
    with torch.no_grad(), pytest.raises(GuardError, match="grad_mode is False, expected True"):
        fast(*args)


def test_a_global_hook_is_refused(models: types.ModuleType, make: Callable[..., Path]) -> None:
    args, kwargs = models.inputs("mlp")
    fast = load(make("mlp"), models.mlp())
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(GuardError, match="global_module_hooks is 1, expected 0"):
            fast(*args, **kwargs)
    finally:
        hook.remove()


def test_tensors_that_are_changed_in_place_may_not_share_memory(models: types.ModuleType, make: Callable[..., Path]) -> None:
    model = models.cnn()
    fast = load(make("cnn"), model)
    shared = torch.zeros(8)
    model.norm.running_mean, model.norm.running_var = shared[:4], shared[4:]
    with pytest.raises(GuardError, match="which is changed in place, shares its memory"):
        fast(*models.inputs("cnn")[0])


def test_code_that_is_replaced_after_loading_is_noticed(
    models: types.ModuleType, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.modes()
    args, _ = models.inputs("modes")
    fast = load(make("modes"), model)
    fast(*args)
    monkeypatch.setattr(models.Modes, "forward", lambda self, x: x)
    with pytest.raises(GuardError, match="the forward of its class Modes was replaced"):
        fast(*args)


def test_the_guards_of_the_artifact_and_those_of_dynamo_agree(
    models: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What dynamo's own guard manager refuses, and only that, is what the artifact's guards (tested above) refuse."""
    args, kwargs = models.inputs("mlp")
    for change in CHANGES:
        monkeypatch.setattr(models, "SCALE", 2.0)
        model = models.mlp()
        _, _, guards, _ = capture_dynamo(Program(model, args, kwargs))
        assert guards.holds(args, kwargs)
        change(model, models)
        assert not guards.holds(args, kwargs), change.__name__


def test_a_function_of_torch_that_somebody_replaced_is_noticed_at_load(
    models: types.ModuleType, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make("mlp")
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: torch.zeros(4, 20))
    with pytest.raises(ManifestMismatchError, match=r"torch\.nn\.modules\.linear\.F\.linear is .*<lambda>, not torch's linear"):
        load(path, models.mlp())
