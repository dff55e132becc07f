"""``torch.accelerator``, where there is none, answers as ``torch.cuda`` does."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
import torch

from device_modes import in_mode
from torchspan.core.report import Report
from torchspan.environment.facts import Facts

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_a_program_is_told_of_a_device_and_tensors_for_it_are_on_the_cpu(redirected: Report) -> None:
    assert torch.accelerator.is_available()
    assert torch.accelerator.device_count() == torch.cuda.device_count() == 1
    device = torch.accelerator.current_accelerator()
    assert device == torch.accelerator.current_accelerator(check_available=True) == torch.device("cuda")
    assert torch.ones(2, device=device).sum() == 2
    answers = {decision.subject: decision.choice for decision in redirected.decisions}
    assert (
        answers["torch.accelerator.current_accelerator()"] == "cuda" and answers["torch.accelerator.is_available()"] == "True"
    )
    assert all(decision.site.startswith(__file__) for decision in redirected.decisions if decision.site)


def test_its_device_and_its_stream_are_those_of_cuda(redirected: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.accelerator.set_device_index(torch.device("cuda", 0))
    assert torch.accelerator.current_device_index() == torch.cuda.current_device() == 0
    for device in (None, 0, "cuda", torch.device("cuda:0"), torch.cuda):  # torchtitan gives the module
        assert torch.accelerator.current_stream(device) == torch.cuda.current_stream()
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        assert torch.accelerator.current_stream() == torch.cuda.current_stream() != torch.cuda.default_stream()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(torch.cuda.default_stream()):
        torch.accelerator.set_stream(stream)
        assert torch.cuda.current_stream() == stream
    torch.accelerator.synchronize()
    torch.accelerator.synchronize("cuda:0")


def test_another_device_is_current_inside_a_block(redirected: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="invalid device ordinal"), torch.accelerator.device_index(3):
        pass
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with torch.accelerator.device_index(3):
        assert torch.accelerator.current_device_index() == 3
        with torch.accelerator.device_index(None):
            assert torch.cuda.current_device() == 3
    assert torch.accelerator.current_device_index() == 0


@pytest.mark.skipif(not hasattr(torch.accelerator, "memory_allocated"), reason="torch.accelerator.memory came with torch 2.9")
def test_memory_is_that_of_cuda(redirected: Report) -> None:
    torch.accelerator.empty_cache()
    torch.accelerator.reset_peak_memory_stats()
    held = torch.ones(1 << 20, device="cuda")
    assert torch.accelerator.memory_allocated() >= held.nbytes
    assert torch.accelerator.max_memory_allocated(0) >= held.nbytes
    assert torch.accelerator.memory_stats().keys() == torch.cuda.memory_stats().keys()


def test_torchs_own_code_is_told_the_truth(redirected: Report) -> None:
    program = "import torch\nanswer = torch.accelerator.is_available()"
    names = {"__name__": "torch.utils.data.dataloader"}
    exec(program, names)
    assert names["answer"] is False


def test_another_accelerator_is_left_to_torch() -> None:
    before = vars(torch.accelerator).copy(), torch.accelerator.is_available.__code__
    with in_mode(facts=Facts(has_mps=True)):
        assert (vars(torch.accelerator), torch.accelerator.is_available.__code__) == before


COMPILED = """
import torch
from torchspan.core.report import Report
from torchspan.devices._base import device_patches
from torchspan.environment.facts import Facts
from torchspan.environment.scope import Environment

report = Report()
environment = Environment(device_patches(Facts(), "auto", report), report)
environment.activate()
import torch._dynamo.utils

def available(x):
    if torch.accelerator.is_available():
        x = x.cuda() + 1 + torch.accelerator.current_device_index()
    torch.cuda.synchronize()
    return x + torch.zeros(3, device="cuda")

def current(x):
    x = x.to(torch.accelerator.current_accelerator())
    torch.accelerator.synchronize()
    return x + 1

def inside(x):
    with torch.cuda.device(0):
        return x.cuda() + 1

class Module(torch.nn.Module):
    def forward(self, x):
        return current(x)

def run(function, fullgraph):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=fullgraph)
    for _ in range(3):
        assert compiled(torch.zeros(3)).tolist() == [1.0] * 3
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]

is_newer = hasattr(torch.accelerator, "get_memory_info")  # torch 2.8 cannot have the answer of current_accelerator in a graph
assert run(available, True) == run(inside, True) == 1
counts = run(current, is_newer), run(Module(), is_newer)
assert counts == (1, 1) or not is_newer, counts
sites = {decision.subject: decision.site for decision in report.decisions}
assert sites["torch.accelerator.is_available()"].startswith(__file__), sites
environment.deactivate()
torch._dynamo.reset()
assert torch.compile(lambda x: x + 1, backend="aot_eager")(torch.zeros(3)).tolist() == [1.0] * 3
"""


@pytest.mark.parametrize("first", ["", "import torch; torch.compile(lambda x: x + 1, backend='eager')(torch.ones(2))"])
def test_compiled_code_asks_too_and_the_compiler_is_told_the_truth(first: str, run_python: Run) -> None:
    run_python(f"{first}\n{COMPILED}")


def test_a_device_module_is_cudas(redirected: Report) -> None:
    assert torch.get_device_module() is torch.cuda and torch.get_device_module("cpu") is torch.cpu


def test_strict_leaves_it_to_torch() -> None:
    before = torch.accelerator.is_available.__code__
    with in_mode("strict"):
        assert torch.accelerator.is_available.__code__ is before and not torch.accelerator.is_available()
