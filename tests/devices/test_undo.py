"""What the rules change is put back exactly."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

SNAPSHOTS = """
import json, sys, types, torch, torch.profiler
import torch.distributed.device_mesh, torch.distributed.fsdp
import torch._dynamo  # which changes torch itself when it is imported
from torchspan.core.report import Report
from torchspan.devices._base import device_patches
from torchspan.environment.facts import Facts
from torchspan.environment.scope import Environment

MODULES = [name for name in sys.modules if name == "torch" or name.startswith("torch.")]

def holders():
    for name in MODULES:
        module = sys.modules[name]
        yield name, module
        for attribute, value in list(vars(module).items()):
            if issubclass(type(value), type) and (value.__module__ or "").startswith("torch"):
                yield f"{name}.{attribute}", value

def function_state(value):
    value = value.__func__ if type(value) in (staticmethod, classmethod) else value
    if type(value) is types.FunctionType:
        return (id(value.__code__), value.__defaults__ and [id(v) for v in value.__defaults__],
                value.__kwdefaults__ and {k: id(v) for k, v in value.__kwdefaults__.items()}, sorted(vars(value)))

def snapshot():
    return {f"{name}.{attribute}": (id(value), function_state(value), value)
            for name, holder in holders() for attribute, value in list(vars(holder).items())}

def changed(now):
    return sorted(name for name in before if now.get(name, (0, 0))[:2] != before[name][:2])

torch.set_default_device("cpu"), torch.set_default_device(None)  # torch imports and remembers a little
answers = {}
before = snapshot()
with Environment(device_patches(Facts(num_cuda=1))):
    answers["changed where there is CUDA"] = changed(snapshot())
environment = Environment(device_patches(Facts(), "auto", Report()))
environment.activate()
answers["changed"] = changed(snapshot())
x = torch.zeros(3, device="cuda").cuda()
with torch.autocast("cuda"), torch.cuda.stream(torch.cuda.Stream()):
    torch.nn.Linear(3, 2).cuda()(x)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = x + 1
environment.deactivate()
after = snapshot()
answers["changed after"] = changed(after)
answers["added"] = sorted(name for name in set(after) - set(before) if "__getattr__" in name or ".Tensor." in name)
answers["was there"] = sorted(before)
assert not torch.cuda.is_available()
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(run_python_once: Run) -> dict[str, Any]:
    """What of torch was another object, by name: with the rules where there is CUDA, with them here, and after them."""
    return json.loads(run_python_once(SNAPSHOTS).stdout.splitlines()[-1])


def test_every_attribute_of_torch_is_there_again(answers: dict[str, Any]) -> None:
    assert len(answers["changed"]) > 150
    for name in (
        "torch.zeros",
        "torch.Tensor.to",
        "torch.cuda.is_available",
        "torch.nn.modules.module.Module.cuda",
        "torch.amp.autocast_mode.autocast.__init__",
        "torch.cuda.streams.Stream.__new__",
    ):
        assert name in answers["changed"] or name not in answers["was there"], name
    assert answers["changed after"] == [] and answers["added"] == []


def test_nothing_is_patched_where_there_is_cuda(answers: dict[str, Any]) -> None:
    assert answers["changed where there is CUDA"] == []


def test_the_rules_can_come_and_go_many_times(run_python: Run) -> None:
    run_python(
        """
        import torch
        from torchspan.devices._base import device_patches
        from torchspan.environment.facts import Facts
        from torchspan.environment.scope import Environment
        for _ in range(3):
            with Environment(device_patches(Facts())):
                with Environment(device_patches(Facts())):
                    assert torch.cuda.device_count() == 1 and torch.zeros(2, device="cuda").sum() == 0
                assert torch.cuda.is_available() and torch.ones(2).cuda().sum() == 2
                kept = torch.zeros
            assert not torch.cuda.is_available()
            try:
                kept(2, device="cuda")
            except (AssertionError, RuntimeError) as error:
                assert "CUDA" in str(error) or "NVIDIA" in str(error)
            else:
                raise SystemExit("a function that outlived its rules redirected")
            assert kept(2).sum() == 0
        """
    )
