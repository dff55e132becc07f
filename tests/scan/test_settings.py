"""To set what this torch does not know is refused, where it would be kept and read by nothing."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from types import ModuleType
from typing import Any

import cloudpickle
import pytest
import torch

from torchspan.core.errors import UnknownSettingError
from torchspan.scan._settings import SETTINGS, _with_refusal

PROGRAM = """
import json, sys
import torch

def ask(question):
    try:
        return question()
    except Exception as error:
        return [[kind.__name__ for kind in type(error).__mro__], str(error)]

def set_on(holder, name, value):
    setattr(holder, name, value)
    return "set"

class Module: pass
x = torch.ones(2)
settings = json.load(open(sys.argv[1]))
minor = ".".join(torch.__version__.split(".")[:2])
refused = {}
for place, names in settings.items():
    for name, releases in names.items():
        if minor in releases.split():
            continue
        if place == "torch.Tensor":
            refused[f"{place}.{name}"] = ask(lambda: set_on(x, name, None))
            continue
        try:
            __import__(place)
        except Exception:
            continue
        if not hasattr(sys.modules[place], name):
            refused[f"{place}.{name}"] = ask(lambda: set_on(sys.modules[place], name, 1))

import torch.backends.opt_einsum
answers = {
    "refused": refused,
    "has": [hasattr(x, "grad_dtype"), hasattr(torch.Tensor, "grad_dtype")],
    "own": [ask(lambda: set_on(x, "my_own", 1)), ask(lambda: set_on(torch.backends, "my_own", 1)), torch.backends.my_own],
    "known": [ask(lambda: set_on(torch.backends.cudnn, "benchmark", True)), torch.backends.cudnn.benchmark],
    "overrides": len(torch.overrides.get_overridable_functions()[torch.Tensor]) > 100,
    "compiled": torch.compile(lambda x: x + torch.backends.cudnn.benchmark, backend="eager")(x).tolist(),
    "precision": ask(lambda: set_on(torch.backends, "fp32_precision", "ieee")),
}
import torchspan
torchspan.deactivate()
answers["afterwards"] = type(torch.backends).__setattr__ is type(torch).__setattr__ or type(torch.backends).__name__
answers["set"] = ask(lambda: set_on(x, "grad_dtype", None))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(run_python_once: Callable[..., Any]) -> dict[str, Any]:
    process = run_python_once(PROGRAM, str(SETTINGS), env={"TORCHSPAN": "1"})
    return dict(json.loads(process.stdout.strip().splitlines()[-1]))


def test_every_setting_that_this_torch_lacks_is_refused_with_one_clear_error(answers: dict[str, Any]) -> None:
    assert answers["refused"] or torch.__version__ >= "2.15"
    for name, outcome in answers["refused"].items():
        kinds, message = outcome
        assert {"UnknownSettingError", "UnsupportedError", "AttributeError"} <= set(kinds), name
        assert message.startswith(f"{name} = ") and "torch has this setting" in message and "hasattr(" in message


def test_on_a_torch_without_it_a_tensors_grad_dtype_is_refused_and_not_there(answers: dict[str, Any]) -> None:
    has = hasattr(torch.ones(1), "grad_dtype")
    assert answers["has"] == [has, has]
    assert ("torch.Tensor.grad_dtype" in answers["refused"]) is not has


def test_what_a_program_calls_its_own_or_torch_knows_can_be_set(answers: dict[str, Any]) -> None:
    assert answers["own"] == ["set", "set", 1] and answers["known"] == ["set", True]
    assert answers["precision"] == "set"  # torch's, or the backport's


def test_nothing_else_notices(answers: dict[str, Any]) -> None:
    assert answers["overrides"] is True and answers["compiled"] == [2.0, 2.0]
    assert answers["set"] == "set"  # torchspan is no longer active


def test_a_module_that_refuses_is_a_module_like_others() -> None:
    module = ModuleType("torch.fx")
    module.__class__ = _with_refusal({"late": "2.98 2.99"}, ModuleType)
    with pytest.raises(
        UnknownSettingError, match=r"torch.fx.late = 1: torch has this setting since 2.98; this is .*torch>=2.98"
    ):
        module.late = 1
    vars(module)["late"] = 0  # a backport, or the program, put it there
    module.late = module.own = 1
    assert (module.late, module.own) == (1, 1)
    assert pickle.loads(cloudpickle.dumps(module)) is torch.fx
