"""The modes: ``strict`` refuses what it would redirect, ``torchdevice`` gives the accelerator to what asks for the CPU too."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import torchspan
from device_modes import in_mode
from torchspan.core.errors import InputError, UnsupportedError
from torchspan.core.report import Report
from torchspan.devices._base import device_patches
from torchspan.environment.facts import Facts

NO_MPS = r"(?i)mps"  # what torch says of a machine without one: so the request has gone there


@contextmanager
def mode(name: str, facts: Facts = Facts()) -> Iterator[Report]:  # noqa: B008 - a frozen value
    with in_mode(name, facts) as environment:
        yield environment.report


# strict


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.zeros(2, device="cuda"),
        lambda: torch.zeros(2).cuda(),
        lambda: torch.zeros(2).to("cuda:1"),
        lambda: torch.nn.Linear(2, 2).to("cuda"),
        lambda: torch.autocast("cuda"),
        lambda: torch.cuda.synchronize(),
        lambda: torch.cuda.memory_allocated(),
        lambda: torch.cuda.Stream(),
        lambda: torch.Generator("cuda"),
    ],
)
def test_strict_refuses_and_names_the_line_and_the_remedy(call: Callable[[], object]) -> None:
    with mode("strict"), pytest.raises(UnsupportedError, match=rf"{__file__}:\d+: .*(no CUDA device here|simulated)") as caught:
        call()
    assert "torch.accelerator" in str(caught.value) and "device='auto'" in str(caught.value)


def test_strict_tells_a_program_that_asks_the_truth() -> None:
    with mode("strict") as report:
        assert not torch.cuda.is_available() and torch.cuda.device_count() == 0
        torch.zeros(2, device="cpu").cpu().to("cpu")
    assert report.decisions == ()


def test_strict_ends_a_program_at_the_line_to_be_ported(
    tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    program = tmp_path / "program.py"
    program.write_text("import torch\nx = torch.ones(3)\ny = x.cuda()\n")
    process = run_python(None, "-m", "torchspan", "run", "--device", "strict", str(program), expect=1)
    assert f"{program}:3: Tensor.cuda(device='cuda')" in process.stderr


# torchdevice


def test_without_an_accelerator_the_cpu_stays_and_the_override_is_understood() -> None:
    with mode("torchdevice") as report:
        x = torch.zeros(2, device="cpu:-1")
        assert x.device.type == "cpu" and torch.zeros(2, device="cuda").device.type == "cpu"
        assert x.to("cpu:-1") is x
    assert report.decisions[0].reason == "'cpu:-1' asks for the CPU itself"


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.zeros(2),
        lambda: torch.zeros(2, device="cpu"),
        lambda: torch.zeros(2, device=torch.device("cpu", 0)),
        lambda: torch.zeros(2, device="cuda"),
        lambda: torch.empty(2, device="cpu:-1").to("cpu"),
        lambda: torch.empty(2, device="cpu:-1").cpu(),
        lambda: torch.nn.Linear(2, 2, device="cpu"),
    ],
)
def test_with_an_accelerator_what_asks_for_the_cpu_or_for_nothing_goes_there(call: Callable[[], object]) -> None:
    with mode("torchdevice", Facts(has_mps=True)), pytest.raises((RuntimeError, NotImplementedError), match=NO_MPS):
        call()


def test_the_override_holds_for_one_call_or_for_a_scope_and_never_longer() -> None:
    with mode("torchdevice", Facts(has_mps=True)):
        assert torch.zeros(2, device="cpu:-1").to("cpu:-1").device.type == "cpu"
        with torchspan.keep_cpu():
            assert torch.zeros(2, device="cpu").cpu().device.type == "cpu" and torch.ones(2).device.type == "cpu"
            outcomes: list[str] = []
            thread = threading.Thread(target=lambda: outcomes.append(_outcome()))
            thread.start()
            thread.join()
            assert outcomes == ["refused"]  # another thread is not in the scope
        assert _outcome() == "refused"


def _outcome() -> str:
    try:
        return torch.zeros(2, device="cpu").device.type
    except (RuntimeError, NotImplementedError):
        return "refused"


def test_where_cuda_is_here_only_what_asks_for_the_cpu_is_patched() -> None:
    here = Facts(num_cuda=1)
    assert {patch.owner for patch in device_patches(here, "torchdevice")} >= {"factories", "movement"}
    assert not any(patch.target.startswith("torch.cuda") for patch in device_patches(here, "torchdevice"))
    assert device_patches(here, "strict") == []


def test_a_device_that_only_that_mode_knows_is_torchs_error_elsewhere() -> None:
    with mode("auto"), pytest.raises(RuntimeError, match=r"(?i)device"):
        torch.zeros(2, device="cpu:-1")


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is an accelerator here")
def test_the_value_holds_an_ordinary_device() -> None:
    device = torchspan.TorchDevice()
    assert str(device) == "cpu" and type(device.device) is torch.device
    assert torch.nn.Linear(2, 2).to(device.device).weight.device.type == "cpu"
    assert "no CUDA device here" in repr(torchspan.TorchDevice("cuda"))
    with pytest.raises(InputError, match="TorchDevice\\('cuda:99'\\): no machine has cuda:99"):
        torchspan.TorchDevice("cuda:99")
    with pytest.raises(InputError, match="expected a device, such as 'cuda'"):
        torchspan.TorchDevice("gpu:x")
