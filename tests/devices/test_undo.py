"""What the rules change is put back exactly."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

Run = Callable[..., subprocess.CompletedProcess[str]]

SNAPSHOT = """
import sys, types, torch, torch.profiler
import torch.distributed.device_mesh, torch.distributed.fsdp
import torch._dynamo  # which changes torch itself when it is imported

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
"""


def test_every_attribute_of_torch_is_there_again(run_python: Run) -> None:
    run_python(
        SNAPSHOT
        + """
from torchspan.core.report import Report
from torchspan.devices._base import device_patches
from torchspan.environment.facts import Facts
from torchspan.environment.scope import Environment

torch.set_default_device("cpu"), torch.set_default_device(None)  # torch imports and remembers a little
before = snapshot()
environment = Environment(device_patches(Facts(), "auto", Report()))
environment.activate()
during = snapshot()
changed = {name for name in before if during.get(name, (0, 0))[:2] != before[name][:2]}
assert len(changed) > 150, len(changed)
for name in ("torch.zeros", "torch.Tensor.to", "torch.cuda.is_available", "torch.nn.modules.module.Module.cuda",
             "torch.amp.autocast_mode.autocast.__init__", "torch.cuda.streams.Stream.__new__"):
    assert name in changed or name not in before, name
x = torch.zeros(3, device="cuda").cuda()
with torch.autocast("cuda"), torch.cuda.stream(torch.cuda.Stream()):
    torch.nn.Linear(3, 2).cuda()(x)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = x + 1
environment.deactivate()
after = snapshot()
different = {name for name in {*before, *after} if name in before and after.get(name, (0, 0))[:2] != before[name][:2]}
added = {name for name in set(after) - set(before) if "__getattr__" in name or ".Tensor." in name}
assert not different and not added, (sorted(different), sorted(added))
assert not torch.cuda.is_available()
"""
    )


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


def test_nothing_is_patched_where_there_is_cuda(run_python: Run) -> None:
    run_python(
        SNAPSHOT
        + """
from torchspan.devices._base import device_patches
from torchspan.environment.facts import Facts
from torchspan.environment.scope import Environment
before = snapshot()
with Environment(device_patches(Facts(num_cuda=1))):
    during = snapshot()
assert {name: value[:2] for name, value in before.items()} == {name: during[name][:2] for name in before}
"""
    )
