"""Each redirection is recorded with the program's line, and means what it means on a GPU."""

from __future__ import annotations

import inspect
import pickle
import threading
import time

import pytest
import torch

from torchspan.core.report import Report
from torchspan.core.topics import Standing


def here() -> int:
    """The line of the caller."""
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None
    return frame.f_back.f_lineno


def sites(report: Report) -> dict[str, tuple[str | None, int]]:
    """What was decided: the place and the count, by subject."""
    return {decision.subject: (decision.site, decision.count) for decision in report.decisions}


def test_a_redirection_names_the_line_of_the_program_and_is_counted(redirected: Report) -> None:
    for _ in range(3):
        torch.zeros(2, device="cuda"); line = here()  # fmt: skip  # noqa: E702
    assert sites(redirected) == {"torch.zeros(device='cuda')": (f"{__file__}:{line}", 3)}
    (decision,) = redirected.decisions
    assert (decision.topic, decision.choice) == ("device", "cpu")
    assert decision.reason == "no CUDA device here, nor another accelerator"


def test_a_module_is_one_redirection_at_the_line_that_moved_it(redirected: Report) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    model.to("cuda:0"); line = here()  # fmt: skip  # noqa: E702
    assert sites(redirected) == {"Module.to(device='cuda:0')": (f"{__file__}:{line}", 1)}


def test_what_torch_does_on_behalf_of_the_program_is_the_programs_line(redirected: Report) -> None:
    torch.nn.Linear(2, 3, device="cuda"); line = here()  # fmt: skip  # noqa: E702
    assert {site for site, _ in sites(redirected).values()} == {f"{__file__}:{line}"}


def test_what_is_only_simulated_says_so(redirected: Report) -> None:
    torch.cuda.memory_allocated()
    torch.cuda.Event(enable_timing=True)
    assert all(decision.standing is Standing.SIMULATED for decision in redirected.decisions)
    assert len(redirected.decisions) == 2


@pytest.mark.parametrize(
    "call",
    [
        "set_device(0)",
        "synchronize()",
        "empty_cache()",
        "ipc_collect()",
        "reset_peak_memory_stats()",
        "reset_max_memory_allocated()",
        "memory_summary()",
        "set_per_process_memory_fraction(0.5)",
    ],
)
def test_what_does_little_here_is_in_the_report_when_the_program_asks_and_not_when_torch_does(
    call: str, redirected: Report
) -> None:
    exec(f"import torch\ntorch.cuda.{call}", {"__name__": "torch.utils.data.dataloader"})
    assert redirected.decisions == ()
    exec(f"import torch\ntorch.cuda.{call}", {"__name__": "program"})
    (decision,) = redirected.decisions
    assert decision.subject == f"torch.cuda.{call.partition('(')[0]}()" and decision.standing is Standing.SIMULATED


def test_calls_that_name_no_device_or_the_cpu_are_not_recorded(redirected: Report) -> None:
    x = torch.zeros(2, device="cpu").to("cpu").to(torch.float64).cpu()
    torch.nn.Linear(2, 3).to("cpu").double()(x)
    torch.manual_seed(0)
    assert redirected.decisions == ()


def test_a_move_there_copies_once_and_a_move_back_copies(redirected: Report) -> None:
    x = torch.ones(3)
    y = x.cuda()
    assert y is not x and y.data_ptr() != x.data_ptr()
    assert y.cuda() is y and y.to("cuda") is y and y.to(torch.device("cuda", 0)) is y
    assert y.cpu().data_ptr() != y.data_ptr() and y.to("cpu").data_ptr() != y.data_ptr()
    assert x.cpu() is x and x.to("cpu") is x and x.to(torch.device("cpu")) is x
    assert y.view(3, 1).cuda().data_ptr() == y.data_ptr()
    assert torch.as_tensor(x, device="cuda").data_ptr() != x.data_ptr()
    assert torch.as_tensor(x) is x


def test_a_snapshot_of_a_models_weights_does_not_follow_its_training(redirected: Report) -> None:
    model = torch.nn.Linear(2, 2).cuda()
    best = {name: value.cpu() for name, value in model.state_dict().items()}
    before = best["weight"].clone()
    with torch.no_grad():
        model.weight.add_(1)
    assert torch.equal(best["weight"], before)


def test_leaves_stay_leaves_where_the_gpus_would(redirected: Report) -> None:
    made_there = torch.ones(3, device="cuda", requires_grad=True)
    assert made_there.to("cuda").is_leaf
    moved = torch.ones(3, requires_grad=True).cuda()
    assert not moved.is_leaf


def test_devices_and_tensors_are_torchs_own_and_their_pickles_are_plain(redirected: Report) -> None:
    x = torch.ones(3, device="cuda")
    assert type(x.device) is torch.device and type(torch.device("cuda")) is torch.device
    assert torch.device("cuda:1").type == "cuda" and torch.device("cuda:1").index == 1
    for value in (x, torch.device("cuda"), torch.nn.Linear(2, 2).cuda(), torch.Generator("cuda").get_state(), torch.zeros):
        assert b"torchspan" not in pickle.dumps(value)


@pytest.mark.parametrize("device", ["cuda:", "cuda:x", "gpu", "cuda:-1", "", "cuda:0:1"])
def test_a_malformed_device_gets_torchs_own_error(device: str, redirected: Report) -> None:
    for make in (lambda: torch.zeros(2, device=device), lambda: torch.zeros(2).to(device)):
        with pytest.raises(RuntimeError) as ours:
            make()
        with pytest.raises(RuntimeError) as theirs:
            torch.device(device)
        assert str(ours.value).splitlines()[0] == str(theirs.value).splitlines()[0]


@pytest.mark.parametrize("device", [[], 1.5, object()])
def test_what_is_no_device_at_all_gets_torchs_own_error(device: object, redirected: Report) -> None:
    with pytest.raises(TypeError, match="device"):
        torch.zeros(2, device=device)  # type: ignore[arg-type]


def test_an_index_that_no_machine_has_is_an_error(redirected: Report) -> None:
    for make in (lambda: torch.zeros(2, device="cuda:99"), lambda: torch.ones(2).cuda(99), lambda: torch.cuda.set_device(99)):
        with pytest.raises(RuntimeError, match="CUDA error: invalid device ordinal"):
            make()


def test_other_threads_are_redirected_too(redirected: Report) -> None:
    results: list[float] = []
    thread = threading.Thread(target=lambda: results.append(torch.ones(2, device="cuda").cuda().sum().item()))
    thread.start()
    thread.join()
    assert results == [2.0]


def test_a_graph_replays_into_its_tensors_and_a_capture_changes_nothing(redirected: Report) -> None:
    x, total = torch.zeros(3, device="cuda"), torch.zeros(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    state = torch.get_rng_state()
    with torch.cuda.graph(graph):
        y = (x + 1).view(3, 1) * 2
        noise = torch.rand(3, device="cuda")
        total += y.squeeze(1)
    assert torch.equal(total, torch.zeros(3)) and torch.equal(torch.get_rng_state(), state)
    first = noise.clone()
    x.fill_(4)
    graph.replay()
    graph.replay()
    assert y.squeeze(1).tolist() == [10.0] * 3 and total.tolist() == [20.0] * 3
    assert not torch.equal(noise, first)
    assert isinstance(graph, torch.cuda.CUDAGraph)


def test_a_whole_training_step_can_be_captured(redirected: Report) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1).cuda()
    twin = torch.nn.Linear(4, 1)
    twin.load_state_dict(model.state_dict())
    inputs, graph = torch.zeros(8, 4, device="cuda"), torch.cuda.CUDAGraph()
    optimizer, other = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(twin.parameters(), lr=0.1)
    with torch.cuda.graph(graph):
        optimizer.zero_grad(set_to_none=True)
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
    for _ in range(3):
        batch = torch.randn(8, 4)
        inputs.copy_(batch)
        graph.replay()
        other.zero_grad(set_to_none=True)
        expected = twin(batch).square().mean()
        expected.backward()
        other.step()
        assert torch.equal(loss, expected)
    assert torch.equal(model.weight, twin.weight)


def test_what_a_capture_frees_stays_freed_and_a_trace_inside_it_is_not_recorded(redirected: Report) -> None:
    from torch._subclasses import FakeTensorMode

    buffer, graph = torch.ones(4, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        buffer.mul_(2)
        with FakeTensorMode() as mode:
            assert mode.from_tensor(torch.ones(2)).add_(1).shape == (2,)
        buffer.untyped_storage().resize_(0)
    assert buffer.untyped_storage().nbytes() == 0


def test_streams_and_events_are_of_their_class_and_keep_time(redirected: Report) -> None:
    stream, other = torch.cuda.Stream(priority=-1), torch.cuda.Stream()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with pytest.raises(ValueError, match="Both events must be recorded"):
        begin.elapsed_time(end)
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() == stream != other
        with torch.cuda.stream(other):
            assert torch.cuda.current_stream() == other
        assert torch.cuda.current_stream() == stream
        begin.record()
        time.sleep(0.02)
        stream.record_event(end)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert 15 < begin.elapsed_time(end) < 500
    assert isinstance(stream, torch.cuda.Stream) and isinstance(begin, torch.cuda.Event)
    assert stream.query() and end.query() and stream.cuda_stream != other.cuda_stream


def test_memory_figures_are_those_of_the_process(redirected: Report) -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    x = torch.zeros(1 << 22, device="cuda")
    during = torch.cuda.memory_allocated()
    del x
    assert during - before >= 16 << 20
    assert torch.cuda.memory_allocated() - before < 16 << 20
    assert torch.cuda.max_memory_allocated() >= during
    assert torch.cuda.memory_stats()["allocated_bytes.all.peak"] >= during
    assert torch.cuda.mem_get_info()[1] == torch.cuda.get_device_properties(0).total_memory


def test_seeds_and_states_are_those_of_the_generator_that_draws(redirected: Report) -> None:
    torch.cuda.manual_seed(3)
    first = torch.rand(3, device="cuda")
    torch.cuda.manual_seed_all(3)
    assert torch.equal(first, torch.rand(3, device="cuda"))
    state = torch.cuda.get_rng_state()
    second = torch.rand(3, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(second, torch.rand(3, device="cuda"))


def test_the_default_device_and_its_context_are_redirected(redirected: Report) -> None:
    with torch.device("cuda"):
        assert torch.zeros(2).device.type == "cpu"
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta" and torch.zeros(2, device="cuda").device.type == "cpu"
    assert "the default device(device='cuda')" in sites(redirected)


def test_a_cuda_kernel_of_a_custom_operator_serves_until_there_is_one_for_the_cpu(redirected: Report) -> None:
    @torch.library.custom_op("torchspan_test::triple", mutates_args=(), device_types="cuda")
    def triple(x: torch.Tensor) -> torch.Tensor:
        return x * 3

    assert triple(torch.ones(2, device="cuda")).tolist() == [3.0, 3.0]
    triple.register_kernel("cpu")(lambda x: x * 4)
    assert triple(torch.ones(2)).tolist() == [4.0, 4.0]


def test_what_is_computed_on_the_device_is_copied_when_it_is_brought_back(redirected: Report) -> None:
    model = torch.nn.Linear(2, 2).cuda()
    optimizer = torch.optim.Adam(model.parameters(), capturable=True)
    inputs = torch.ones(2, 2, device="cuda")
    model(inputs).sum().backward()
    optimizer.step()
    snapshot = [value.cpu() for state in optimizer.state.values() for value in state.values()]
    doubled = inputs * 2
    back, named = doubled.cpu(), doubled.to("cpu")
    clones = [value.clone() for value in snapshot]
    doubled.zero_()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(snapshot, clones))
    assert back.sum() == named.sum() == 8


def test_settings_of_autocast_for_the_device_are_the_targets(redirected: Report) -> None:
    inputs = torch.ones(2, 2, device="cuda")
    before = torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cuda", torch.float16)
    torch.set_autocast_enabled("cuda", True)
    try:
        assert (inputs @ inputs).dtype == torch.get_autocast_gpu_dtype() == torch.float16
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_gpu_dtype(before)
    assert torch.get_autocast_dtype("cpu") == before and not torch.is_autocast_enabled("cpu")


def test_attention_goes_on_without_the_kernels_of_a_gpu(redirected: Report) -> None:
    query = torch.ones(1, 1, 2, 4, device="cuda")
    torch.backends.cuda.enable_math_sdp(False)
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        assert torch.nn.functional.scaled_dot_product_attention(query, query, query).shape == query.shape
    finally:
        torch.backends.cuda.enable_math_sdp(True)
        torch.backends.cuda.enable_flash_sdp(True)
    assert any("enable_math_sdp" in decision.subject for decision in redirected.decisions)


def test_streams_and_events_of_any_accelerator_are_of_both_kinds(redirected: Report) -> None:
    stream, begin, end = torch.Stream(device="cuda"), torch.Event("cuda", enable_timing=True), torch.Event(enable_timing=True)
    begin.record(stream)
    time.sleep(0.01)
    stream.record_event(end)
    stream.wait_event(end)
    torch.cuda.Stream().wait_stream(stream)
    assert 8 < begin.elapsed_time(end) < 500 and stream.query() and stream.device == torch.device("cuda:0")
    assert isinstance(stream, torch.Stream) and isinstance(torch.cuda.Stream(), torch.Stream) and torch.Stream("cuda") != stream
    assert (
        isinstance(begin, torch.Event) and isinstance(torch.cuda.Event(), torch.Event) and not isinstance(begin, torch.Stream)
    )
    assert issubclass(torch.cuda.Stream, torch.Stream) and issubclass(torch.cuda.Event, torch.Event)
    least, greatest = torch.cuda.Stream.priority_range()
    assert torch.cuda.Stream(priority=greatest).priority == greatest <= least
    with stream:
        assert torch.accelerator.current_stream() == torch.cuda.current_stream() == stream
    assert torch.Stream("cpu").device.type == "cpu"


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_storages_are_made_and_copied_there_and_back(redirected: Report) -> None:
    assert (
        torch.UntypedStorage(4, device="cuda").nbytes() == torch.UntypedStorage(4, device=torch.device("cuda:0")).nbytes() == 4
    )
    host = torch.ones(3).untyped_storage()
    there = host.to(device="cuda")
    assert there.tolist() == host.tolist() and there.data_ptr() != host.data_ptr() and there.cuda() is there
    assert there.cpu().data_ptr() != there.data_ptr() and host.cpu() is host
    typed = torch.TypedStorage([1.0, 2.0], dtype=torch.float32, device="cuda")
    assert typed.cuda().tolist() == torch.arange(1.0, 3.0).storage().to(device="cuda").tolist() == [1.0, 2.0]
    subjects = {decision.subject for decision in redirected.decisions}
    assert {"torch.UntypedStorage(device='cuda')", "UntypedStorage.to(device='cuda')"} <= subjects


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_batches_of_a_loader_are_pinned_for_the_program(num_workers: int, redirected: Report) -> None:
    data = torch.utils.data.TensorDataset(torch.arange(6.0), torch.arange(6))
    loader = torch.utils.data.DataLoader(data, batch_size=3, pin_memory=True, num_workers=num_workers)
    assert loader.pin_memory
    batches = [(x.is_pinned(), y.is_pinned(), x.cuda(non_blocking=True).sum().item()) for x, y in loader]
    assert batches == [(True, True, 3.0), (True, True, 12.0)]
    assert not next(iter(torch.utils.data.DataLoader(data)))[0].is_pinned()
    assert {"DataLoader(pin_memory=True)", "Tensor.cuda(device='cuda')"} == set(sites(redirected))


def test_types_of_tensors_of_cuda_make_and_convert(redirected: Report) -> None:
    x = torch.cuda.FloatTensor([1.0, 2.0])
    assert (
        isinstance(x, torch.cuda.FloatTensor) and isinstance(x, torch.Tensor) and torch.cuda.LongTensor(3).dtype is torch.int64
    )
    assert x.type(torch.cuda.HalfTensor).dtype is torch.float16 and x.type(torch.FloatTensor).data_ptr() != x.data_ptr()
    assert pickle.loads(pickle.dumps(torch.cuda.FloatTensor)) is torch.cuda.FloatTensor
    assert torch.ones(2).type_as(x).data_ptr() != x.data_ptr() and x.type_as(x) is x


def test_lazy_modules_are_made_and_moved_there(redirected: Report) -> None:
    assert torch.nn.LazyLinear(2, device="cuda")(torch.ones(1, 3, device="cuda")).shape == (1, 2)
    assert torch.nn.LazyLinear(2).cuda().to("cuda")(torch.ones(1, 3).cuda()).shape == (1, 2)


def test_a_kernel_may_be_registered_by_its_full_name(redirected: Report) -> None:
    torch.library.define("torchspan_test::doubled", "(Tensor x) -> Tensor")
    torch.library.impl("torchspan_test::doubled", "cuda", lambda x: x * 2)
    assert torch.ops.torchspan_test.doubled(torch.ones(2, device="cuda")).tolist() == [2, 2]


def test_memory_that_is_not_there_is_the_error_that_programs_for_a_gpu_catch(redirected: Report) -> None:
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(1 << 50, device="cuda")


def test_blocks_that_name_no_device_and_markers_do_nothing(redirected: Report) -> None:
    with torch.cuda.device(None), torch.cuda.device(-1), torch.cuda.device("cuda:0"), torch.autograd.profiler.emit_nvtx():
        assert torch.cuda.current_device() == 0
    assert torch.backends.cuda.is_built()


def test_what_compiled_code_asks_of_the_device_is_answered(redirected: Report) -> None:
    @torch.compile(backend="eager")
    def function(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if torch.cuda.get_device_capability()[0] >= 7 else x

    assert function(torch.ones(2, device="cuda")).tolist() == [2, 2]
