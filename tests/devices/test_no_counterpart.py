"""What has no counterpart on one device is honoured where that is simple, and otherwise refused with the line and a remedy."""

from __future__ import annotations

import importlib.util
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import CUDA_HOME

from device_modes import in_mode
from torchspan.core.errors import UnsupportedError
from torchspan.core.report import Report
from torchspan.core.topics import Standing
from torchspan.devices._redirect import PlacementWarning

Run = Callable[..., subprocess.CompletedProcess[str]]


def _green_context() -> object:
    from torch.cuda.green_contexts import GreenContext

    return GreenContext.create(num_sms=8, device_id=0)


def _cuda_extension() -> object:
    from torch.utils.cpp_extension import load_inline

    return load_inline("twice", cpp_sources="", cuda_sources="__global__ void twice(float* x) {}")


def _gds_file() -> object:
    from torch.cuda.gds import GdsFile

    return GdsFile("weights.bin", 0)


@pytest.mark.parametrize(
    ("call", "name", "remedy"),
    [
        (lambda: torch.ones(3, device="cuda").untyped_storage()._share_cuda_(), "_share_cuda_", "share_memory_"),
        (
            lambda: torch.cuda.jiterator._create_jit_fn("template <typename T> T f(T x) { return x; }")(
                torch.ones(2, device="cuda")
            ),
            "_JittedFunction",
            "torch.compile",
        ),
        (lambda: torch.cuda.memory.CUDAPluggableAllocator("a.so", "alloc", "free"), "CUDAPluggableAllocator", "leave it out"),
        (lambda: torch.cuda.caching_allocator_alloc(1024), "caching_allocator_alloc", "leave it out"),
        (lambda: torch.cuda.caching_allocator_delete(1), "caching_allocator_delete", "leave it out"),
        (lambda: torch.cuda.current_blas_handle(), "current_blas_handle", "leave it out"),
        (lambda: torch.cuda.temperature(), "temperature", "psutil"),
        (lambda: torch.cuda.power_draw(0), "power_draw", "psutil"),
        (lambda: torch.cuda.clock_rate("cuda:0"), "clock_rate", "psutil"),
        (lambda: torch.cuda.tunable.tune_gemm_in_file("untuned.csv"), "tune_gemm_in_file", "leave it out"),
        (_gds_file, "GdsFile", "mmap=True"),
        pytest.param(
            _cuda_extension,
            "load_inline",
            "CppExtension",
            marks=pytest.mark.skipif(CUDA_HOME is not None, reason="there is a CUDA compiler here"),
        ),
        pytest.param(
            lambda: torch.cuda._compile_kernel("__global__ void f() {}", "f"),
            "_compile_kernel",
            "torch.compile",
            marks=pytest.mark.skipif(not hasattr(torch.cuda, "_compile_kernel"), reason="came with torch 2.9"),
        ),
        pytest.param(
            _green_context,
            "GreenContext",
            "all cores",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("torch.cuda.green_contexts") is None, reason="came after torch 2.8"
            ),
        ),
    ],
)
def test_a_refusal_names_the_line_the_reason_and_what_to_do(
    call: Callable[[], object], name: str, remedy: str, redirected: Report
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        call()
    assert str(caught.value).startswith(f"{__file__}:") and name in str(caught.value) and remedy in str(caught.value)
    refused = [decision for decision in redirected.decisions if decision.choice == "refused"]
    assert [decision.site for decision in refused] == [str(caught.value).partition(": ")[0]] and name in refused[0].subject


@pytest.fixture
def on_the_cpu() -> Iterator[Report]:
    """The report where the CPU was asked for by name: it takes every index."""
    with in_mode("cpu") as environment, warnings.catch_warnings():
        warnings.simplefilter("ignore", PlacementWarning)
        yield environment.report


def test_copies_between_devices_are_copies_on_the_one_that_is_here(on_the_cpu: Report) -> None:
    from torch.cuda import comm

    x = torch.arange(6.0, device="cuda")
    first, second = comm.broadcast(x, ["cuda:0", "cuda:1"])
    assert torch.equal(first, x) and torch.equal(second, x) and second.data_ptr() != x.data_ptr()
    assert [part.tolist() for part in comm.scatter(x, ["cuda:0", "cuda:1"])] == [[0, 1, 2], [3, 4, 5]]
    assert [part.numel() for part in comm.scatter(x, [0, 1], chunk_sizes=[2, 4])] == [2, 4]
    assert torch.equal(comm.gather(comm.scatter(x, [0, 1])), x)
    assert comm.reduce_add([x, x, x]).tolist() == (3 * x).tolist()
    assert [each.tolist() for each in comm.reduce_add_coalesced([[x, x], [x, x]])] == [(2 * x).tolist()] * 2
    assert len(comm.broadcast_coalesced([x, x], [0, 1, 2])) == 3
    with pytest.raises(ValueError, match="different shapes"):
        comm.reduce_add([x, x[:2]])
    assert {"torch.cuda.comm.scatter()", "torch.cuda.comm.gather()"} <= {each.subject for each in on_the_cpu.decisions}


def test_collectives_of_one_process_are_computed_on_the_one_device(redirected: Report) -> None:
    from torch.cuda import nccl

    def tensors() -> list[torch.Tensor]:
        return [torch.tensor([1.0, 2.0], device="cuda:0"), torch.tensor([3.0, 5.0], device="cuda:0")]

    inputs = tensors()
    nccl.all_reduce(inputs)
    assert [each.tolist() for each in inputs] == [[4.0, 7.0]] * 2
    inputs, gathered, scattered = tensors(), [torch.zeros(4) for _ in range(2)], [torch.zeros(1) for _ in range(2)]
    nccl.all_gather(inputs, gathered)
    nccl.reduce_scatter(inputs, scattered)
    assert gathered[1].tolist() == [1.0, 2.0, 3.0, 5.0] and [each.item() for each in scattered] == [4.0, 7.0]
    nccl.reduce(inputs, root=1)
    assert [each.tolist() for each in inputs] == [[1.0, 2.0], [4.0, 7.0]]
    nccl.broadcast(inputs)
    assert inputs[1].tolist() == [1.0, 2.0] and not nccl.is_available(inputs)


def test_switches_for_tuning_are_remembered_and_said_to_be_simulated(redirected: Report) -> None:
    torch.cuda.tunable.enable()
    torch.cuda.tunable.set_max_tuning_iterations(7)
    assert torch.cuda.tunable.is_enabled() and torch.cuda.tunable.get_max_tuning_iterations() == 7
    torch.cuda.tunable.enable(False)
    assert not torch.cuda.tunable.is_enabled()
    assert all(decision.standing is Standing.SIMULATED for decision in redirected.decisions) and redirected.decisions


def test_the_load_of_this_machine_is_a_devices(redirected: Report) -> None:
    for figure in (torch.cuda.utilization(), torch.cuda.memory_usage(0)):
        assert isinstance(figure, int) and 0 <= figure <= 100
    assert all(decision.standing is Standing.SIMULATED for decision in redirected.decisions) and len(redirected.decisions) == 2


def test_a_pool_of_memory_is_simulated(redirected: Report) -> None:
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        x = torch.ones(3, device="cuda")
    assert isinstance(pool, torch.cuda.MemPool) and pool.use_count() == 1 and pool.id != torch.cuda.MemPool().id
    assert x.sum() == 3


def test_an_index_that_the_program_was_not_told_of_is_torchs_error_with_the_line_and_a_remedy(redirected: Report) -> None:
    kind = getattr(torch, "AcceleratorError", RuntimeError)
    for call in (
        lambda: torch.ones(2, device="cuda:1"),
        lambda: torch.ones(2).to("cuda:2"),
        lambda: torch.ones(2).cuda(1),
        lambda: torch.nn.Linear(2, 2).to("cuda:1"),
        lambda: torch.cuda.set_device(1),
        lambda: torch.cuda.synchronize(1),
        lambda: torch.cuda.Stream(device=1),
        lambda: torch.cuda.memory_allocated("cuda:1"),
    ):
        with pytest.raises(kind, match=rf"CUDA error: invalid device ordinal \({__file__}:\d+: .*--device cpu") as caught:
            call()
        assert "device_count() is 1" in str(caught.value)
    for query in (torch.cuda.get_device_properties, torch.cuda.get_device_name, torch.cuda.get_device_capability):
        with pytest.raises(AssertionError, match="Invalid device id"):
            query(1)
    refused = {decision.subject for decision in redirected.decisions if decision.choice == "refused"}
    assert refused == {"the device cuda:1", "the device cuda:2"}


@pytest.mark.parametrize("device", ["cpu", torch.device("meta"), "cuda:x"])
def test_what_is_no_cuda_device_is_torchs_own_error(device: object, redirected: Report) -> None:
    for query in ("set_device", "get_device_name", "get_device_properties", "get_device_capability", "synchronize", "Stream"):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            getattr(torch.cuda, query)(device)
        with pytest.raises((ValueError, RuntimeError)) as theirs:
            torch.cuda._utils._get_device_index(device)
        assert str(caught.value) == str(theirs.value) and type(caught.value) is type(theirs.value)
    with pytest.raises(ValueError, match="specified index"):
        torch.cuda.set_device("cuda")


def test_several_devices_where_the_cpu_stands_in_for_all_are_warned_of_once() -> None:
    with in_mode("cpu") as environment:
        torch.ones(2, device="cuda:0")
        with pytest.warns(PlacementWarning, match=r"cuda:0 to cuda:1; run a process for each device") as caught:
            torch.ones(2, device="cuda:1")
        torch.ones(2).to("cuda:2")  # a second warning would be an error
    assert len(caught) == 1 and caught[0].filename == __file__
    reasons = {decision.subject: decision.reason for decision in environment.report.decisions}
    assert reasons["torch.ones(device='cuda:1')"].endswith("one device stands in for cuda:0 to cuda:1")
    assert "stands in" not in reasons["torch.ones(device='cuda:0')"] and "stands in" in reasons["Tensor.to(device='cuda:2')"]


def test_each_of_a_launchers_ranks_has_its_own_device(redirected: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    torch.ones(2, device="cuda:1")
    assert "stands in" not in redirected.decisions[0].reason


TRITON = """
import torch
from torchspan.core.errors import UnsupportedError
from torchspan.core.report import Report
from torchspan.devices._base import device_patches
from torchspan.environment.facts import Facts
from torchspan.environment.scope import Environment
Environment(device_patches(Facts()), Report()).activate()
import os, triton
import triton.language as tl

@triton.jit
def twice(source, target, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, 2 * tl.load(source + at, mask=at < n), mask=at < n)

x = torch.arange(5.0, device="cuda")
y = torch.empty_like(x)
try:
    twice[(2,)](x, y, 5, BLOCK=4)
except UnsupportedError as error:
    assert os.environ.get("TRITON_INTERPRET") == "0"
    assert f"{__file__}:20: the Triton kernel twice" in str(error) and "TRITON_INTERPRET=1" in str(error), error
else:
    assert os.environ.get("TRITON_INTERPRET") != "0" and y.tolist() == [0.0, 2.0, 4.0, 6.0, 8.0], y
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("env", [{"TRITON_INTERPRET": "0"}, {"TRITON_INTERPRET": "1"}, {}], ids=str)
def test_a_triton_kernel_is_interpreted_unless_the_user_forbids_it(
    env: dict[str, str], run_python: Run, tmp_path: Path
) -> None:
    run_python(TRITON, env={**env, "TRITON_CACHE_DIR": str(tmp_path / "cache")})
