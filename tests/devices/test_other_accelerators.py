"""A program for MPS or XPU runs where there is neither; whether they are here is answered with the truth."""

from __future__ import annotations

import pytest
import torch

from torchspan.core.errors import UnsupportedError
from torchspan.core.report import Report
from torchspan.core.topics import Standing
from torchspan.devices._base import device_patches
from torchspan.environment.facts import Facts
from torchspan.environment.scope import Environment


def test_a_program_for_mps_trains(redirected: Report) -> None:
    torch.mps.manual_seed(3)
    model = torch.nn.Linear(4, 1).to("mps")
    x = torch.randn(8, 4, device="mps")
    begin, end = torch.mps.Event(enable_timing=True), torch.mps.Event(enable_timing=True)
    begin.record()
    model(x).square().mean().backward()
    end.record()
    torch.mps.synchronize()
    assert begin.elapsed_time(end) > 0 and x.device.type == "cpu"
    state = torch.mps.get_rng_state()
    first = torch.rand(3, device="mps")
    torch.mps.set_rng_state(state)
    assert torch.equal(first, torch.rand(3, device="mps"))
    torch.mps.empty_cache()
    assert torch.mps.driver_allocated_memory() > 0 and torch.mps.recommended_max_memory() > 1 << 28
    simulated = {
        decision.subject: decision.site for decision in redirected.decisions if decision.standing is Standing.SIMULATED
    }
    assert {"torch.mps.synchronize()", "torch.mps.empty_cache()", "torch.mps.manual_seed()"} <= simulated.keys()
    assert not any(subject.startswith("torch.cuda") for subject in simulated)
    assert all(site is not None and site.startswith(__file__) for site in simulated.values())


def test_a_program_for_xpu_runs(redirected: Report) -> None:
    torch.xpu.manual_seed_all(3)
    first = torch.rand(3, device="xpu:0")
    torch.xpu.manual_seed(3)
    assert torch.equal(first, torch.rand(3, device="xpu"))
    torch.xpu.set_device(0)
    torch.xpu.synchronize()
    torch.xpu.empty_cache()
    assert torch.xpu.current_device() == 0 and torch.xpu.memory_allocated() >= 0
    assert torch.xpu.get_device_properties(0).total_memory > 0 and torch.xpu.get_device_name()
    with torch.xpu.device(0):
        event = torch.xpu.Event(enable_timing=True)
        event.record(torch.xpu.Stream())
    assert "torch.xpu.synchronize()" in {decision.subject for decision in redirected.decisions}


def test_whether_they_are_here_is_the_truth_so_a_portable_program_takes_cuda(redirected: Report) -> None:
    kinds = {"mps": torch.backends.mps.is_available, "xpu": torch.xpu.is_available, "cuda": torch.cuda.is_available}
    assert next(kind for kind, is_available in kinds.items() if is_available()) == "cuda"


def test_a_shader_is_refused(redirected: Report) -> None:
    with pytest.raises(UnsupportedError, match=f"{__file__}.*compile_shader.*Apple's compiler"):
        torch.mps.compile_shader("kernel void f() {}")


def test_a_kind_that_is_here_is_left_alone() -> None:
    before = torch.mps.synchronize.__code__, torch.xpu.synchronize.__code__
    for facts in (Facts(has_mps=True), Facts(num_xpu=1), Facts(num_cuda=1)):
        with Environment(device_patches(facts)):
            assert (torch.mps.synchronize.__code__, torch.xpu.synchronize.__code__) == before
