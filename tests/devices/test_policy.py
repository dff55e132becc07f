"""The policy: pure, so every machine is tested on this one."""

from __future__ import annotations

import pytest

from torchspan.core.errors import InputError
from torchspan.devices._base import device_patches
from torchspan.devices._policy import DeviceRequest, choose
from torchspan.environment.facts import Facts

NOTHING, CUDA, TWO, MPS, XPU = Facts(), Facts(num_cuda=1), Facts(num_cuda=2), Facts(has_mps=True), Facts(num_xpu=1)


@pytest.mark.parametrize(
    ("facts", "kind", "index", "mode", "device"),
    [
        (CUDA, "cuda", None, "auto", "cuda"),
        (TWO, "cuda", 1, "auto", "cuda:1"),
        (MPS, "cuda", None, "auto", "mps"),
        (MPS, "cuda", 3, "auto", "mps"),
        (XPU, "cuda", 0, "auto", "xpu"),
        (CUDA, "mps", None, "auto", "cuda"),
        (NOTHING, "cuda", None, "auto", "cpu"),
        (NOTHING, "mps", None, "auto", "cpu"),
        (NOTHING, "cuda", 7, "auto", "cpu"),
        (NOTHING, "cpu", None, "auto", "cpu"),
        (CUDA, "cpu", None, "auto", "cpu"),
        (MPS, "cpu", None, "auto", "cpu"),
        (NOTHING, "meta", None, "auto", "meta"),
        (CUDA, "cuda", 0, "cpu", "cpu"),
        (TWO, "mps", None, "cpu", "cpu"),
        (MPS, "cuda", None, "mps", "mps"),
        (MPS, "mps", None, "mps", "mps"),
        (MPS, "cpu", None, "torchdevice", "mps"),
        (MPS, "cpu", 2, "torchdevice", "mps"),
        (MPS, "cpu", -1, "torchdevice", "cpu"),
        (MPS, "", None, "torchdevice", "mps"),
        (MPS, "", None, "auto", "cpu"),
        (CUDA, "cpu", None, "torchdevice", "cuda"),
        (CUDA, "mps", None, "torchdevice", "cuda"),
        (CUDA, "cuda", 0, "torchdevice", "cuda:0"),
        (NOTHING, "cpu", None, "torchdevice", "cpu"),
        (NOTHING, "mps", 0, "torchdevice", "cpu"),
        (MPS, "cuda", None, "strict", "mps"),
    ],
)
def test_a_request_is_given_the_device(facts: Facts, kind: str, index: int | None, mode: str, device: str) -> None:
    choice = choose(facts, DeviceRequest(kind, index), mode)
    assert choice.device == device and choice.is_possible and choice.reason


def test_the_reason_names_what_was_missing_and_what_was_found() -> None:
    assert choose(NOTHING, DeviceRequest("cuda")).reason == "no CUDA device here, nor another accelerator"
    assert choose(MPS, DeviceRequest("cuda")).reason == "no CUDA device here; mps is the best accelerator that is"
    assert choose(CUDA, DeviceRequest("cuda"), "cpu").reason == "device='cpu' was asked of torchspan"


def test_an_index_that_is_not_there_is_left_to_torch_where_the_kind_is_here() -> None:
    assert choose(TWO, DeviceRequest("cuda", 1)).device == "cuda:1"
    assert device_patches(TWO) == []


def test_each_index_is_a_device_of_its_own_where_there_are_several_of_another_kind() -> None:
    two, others = Facts(num_xpu=2), Facts(other="npu", num_other=2)
    assert [choose(two, DeviceRequest("cuda", index)).device for index in (None, 0, 1, 2)] == ["xpu", "xpu:0", "xpu:1", "xpu"]
    assert choose(others, DeviceRequest("cuda", 1)).device == "npu:1" and others.accelerator() == "npu"


def test_an_index_that_no_machine_has_is_impossible() -> None:
    assert not choose(NOTHING, DeviceRequest("cuda", 99)).is_possible


def test_nothing_is_patched_where_what_was_asked_for_is_here() -> None:
    assert device_patches(CUDA) == [] and device_patches(TWO, "cuda") == []
    assert device_patches(NOTHING) != [] and device_patches(CUDA, "cpu") != []


def test_an_unknown_device_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(
        InputError, match="device is 'gpu'; expected one of auto, strict, torchdevice, cuda-semantics, off, cpu, cuda, xpu, mps"
    ):
        device_patches(NOTHING, "gpu")
