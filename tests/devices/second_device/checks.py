"""What is asked of a machine whose accelerator is the device "second": each check is a program for CUDA.

``python checks.py`` runs them in one process with the device rules in force, and prints what went wrong with each, as JSON.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable

import second_device

second = second_device.load()

import torch  # noqa: E402

import torchspan  # noqa: E402

environment = torchspan.activate()
Check = Callable[[], None]
CHECKS: list[Check] = []


def check(function: Check) -> Check:
    """Let it be one of those that are run."""
    CHECKS.append(function)
    return function


def draw() -> torch.Tensor:
    return torch.randn(4, device="cuda")


def choices(subject: str) -> set[str]:
    """What was chosen for a subject, so far."""
    return {decision.choice for decision in environment.report.decisions if decision.subject == subject}


# placement


@check
def what_asks_for_cuda_is_on_the_device() -> None:
    values = [
        torch.ones(2, device="cuda"),
        torch.ones(2).cuda(),
        torch.ones(2).to("cuda:0"),
        torch.nn.Linear(2, 2).cuda().weight,
    ]
    assert all(tensor.device.type == "second" for tensor in values)
    assert torch.cuda.is_available() and torch.cuda.device_count() == 2


@check
def each_index_is_a_device_of_its_own() -> None:
    assert torch.ones(2, device="cuda:1").device == torch.device("second:1")
    with torch.cuda.device(1):
        assert torch.ones(2, device="cuda").device.index == torch.cuda.current_device() == second.current_device() == 1
    torch.cuda.set_device(1)
    assert second.current_device() == 1
    torch.cuda.set_device(0)


# random numbers


@check
def a_seed_is_the_devices() -> None:
    torch.cuda.manual_seed(1)
    first, host = draw(), torch.get_rng_state()
    second.manual_seed(1)
    assert torch.equal(first, draw()) and torch.cuda.initial_seed() == second.initial_seed() == 1
    torch.cuda.manual_seed(7)
    assert torch.equal(host, torch.get_rng_state())
    assert choices("torch.cuda.manual_seed()") == {"torch.second.manual_seed"}


@check
def a_seed_of_all_is_of_all() -> None:
    torch.cuda.manual_seed_all(5)
    assert torch.equal(torch.randn(3, device="cuda:0").cpu(), torch.randn(3, device="cuda:1").cpu())
    torch.manual_seed(9)
    assert torch.cuda.initial_seed() == 9
    torch.cuda.seed_all()
    assert torch.cuda.initial_seed() != 9


@check
def states_are_the_devices() -> None:
    state, states = torch.cuda.get_rng_state(), torch.cuda.get_rng_state_all()
    first = draw()
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, draw())
    other = torch.randn(2, device="cuda:1")
    torch.cuda.set_rng_state_all(states)
    assert torch.equal(first, draw()) and torch.equal(other, torch.randn(2, device="cuda:1"))
    assert len(states) == 2 and torch.equal(torch.cuda.get_rng_state("cuda:1"), second.get_rng_state(1))


@check
def a_forked_stream_is_taken_back() -> None:
    for keywords in ({}, {"devices": [0]}, {"devices": [torch.device("cuda", 0)], "device_type": "cuda"}):
        with torch.random.fork_rng(**keywords):
            first = draw()
        assert torch.equal(first, draw()), keywords


@check
def generators_are_of_the_device() -> None:
    generator = torch.Generator(device="cuda").manual_seed(3)
    first = torch.randn(3, device="cuda", generator=generator)
    assert generator.device.type == "second"
    generator.manual_seed(3)
    assert torch.equal(first, torch.randn(3, device="cuda", generator=generator))
    torch.cuda.default_generators[0].manual_seed(4)
    first = draw()
    torch.cuda.manual_seed(4)
    assert torch.equal(first, draw())


# work that is done later


@check
def synchronize_waits_for_the_device() -> None:
    x = torch.zeros(3, device="cuda")
    for wait in (torch.cuda.synchronize, torch.cuda.current_stream().synchronize, lambda: torch.cuda.synchronize("cuda:0")):
        second.sleep(50)
        x.fill_(1)
        started = time.perf_counter()
        wait()
        assert time.perf_counter() - started > 0.04


@check
def streams_are_the_devices() -> None:
    x, stream = torch.zeros(3, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()
    assert isinstance(stream, torch.cuda.Stream) and isinstance(stream, torch.Stream)
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() == stream
        second.sleep(80)
        x.fill_(4)
    assert torch.cuda.current_stream() == torch.cuda.default_stream() != stream
    assert not stream.query() and x.tolist() == [0, 0, 0]
    torch.cuda.current_stream().wait_stream(stream)
    assert x.tolist() == [4, 4, 4]
    torch.cuda.set_stream(stream)
    assert torch.accelerator.current_stream().stream_id == stream.stream_id
    torch.cuda.set_stream(torch.cuda.default_stream())


@check
def events_are_the_devices() -> None:
    begin, end, stream = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True), torch.cuda.Stream()
    x = torch.zeros(3, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        begin.record()
        second.sleep(60)
        x.fill_(2)
        stream.record_event(end)
    assert not end.query() and isinstance(end, torch.cuda.Event)
    torch.cuda.current_stream().wait_event(end)
    assert x.tolist() == [2, 2, 2]
    end.synchronize()
    assert end.query() and 50 < begin.elapsed_time(end) < 5000


@check
def memory_that_another_stream_uses_is_kept() -> None:
    stream, x = torch.cuda.Stream(), torch.ones(1 << 16, device="cuda")
    destination = torch.zeros(1 << 16, device="cuda")
    torch.cuda.synchronize()
    address = x.data_ptr()
    with torch.cuda.stream(stream):
        second.sleep(60)
        destination.copy_(x)
    x.record_stream(stream)
    del x
    other = torch.full((1 << 16,), 7.0, device="cuda")
    torch.cuda.synchronize()
    assert other.data_ptr() != address and destination.sum().item() == 1 << 16


# memory


@check
def figures_are_the_devices() -> None:
    before, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    torch.cuda.reset_peak_memory_stats()
    x = torch.ones(1 << 20, device="cuda")
    assert torch.cuda.memory_allocated() - before == x.nbytes == 1 << 22
    assert torch.cuda.memory_stats()["allocated_bytes.all.current"] == torch.cuda.memory_allocated()
    del x
    assert torch.cuda.max_memory_allocated() == before + (1 << 22) and torch.cuda.memory_allocated() == before
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == before
    assert torch.cuda.memory_reserved() >= 1 << 22
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == second.memory_reserved() < 1 << 22 and torch.cuda.mem_get_info()[0] <= free + (
        1 << 22
    )
    assert torch.cuda.get_device_properties(0).total_memory == torch.cuda.mem_get_info()[1] == 1 << 31


# copies between the two memories


@check
def a_copy_is_waited_for_whose_source_may_be_gone() -> None:
    def pinned() -> torch.Tensor:
        return torch.ones(1 << 18).pin_memory()

    assert pinned().is_pinned()
    buffer = torch.zeros(1 << 18, device="cuda")
    copies = {
        "Tensor.to": lambda: pinned().to("cuda", non_blocking=True),
        "Tensor.cuda": lambda: pinned().cuda(non_blocking=True),
        "Tensor.copy_": lambda: buffer.copy_(pinned(), non_blocking=True),
        "Tensor.to, by name": lambda: torch.ones(1 << 18).to(device="cuda", dtype=torch.float32, non_blocking=True),
        "Module.to": lambda: torch.nn.Linear(1 << 18, 1).to("cuda", non_blocking=True).weight,
        "UntypedStorage.to": lambda: torch.tensor([], device="cuda").set_(
            pinned().untyped_storage().to(device="cuda", non_blocking=True), 0, (1 << 18,)
        ),
    }
    for name, copy in copies.items():
        second.sleep(30)
        moved = copy()
        others = [torch.full((1 << 18,), 9.0).pin_memory() for _ in range(4)]
        second.synchronize()
        assert name == "Module.to" or moved.sum().item() == 1 << 18, name
        assert name == "Module.to" or others[0].sum() > 0
    back = torch.zeros(1 << 18)
    second.sleep(30)
    back.copy_(buffer, non_blocking=True)
    assert back.sum() == 1 << 18
    assert choices("Tensor.to(non_blocking=True)") == {"waits"}


@check
def the_device_itself_does_not_wait() -> None:
    source = torch.ones(1 << 18)
    second.sleep(30)
    moved = torch._C.TensorBase.to(source, "second", non_blocking=True)
    source.fill_(5)
    assert moved.sum().item() == 5 << 18


@check
def a_loader_pins_its_batches() -> None:
    data = torch.utils.data.TensorDataset(torch.arange(8.0))
    (first,), (_,) = torch.utils.data.DataLoader(data, batch_size=4, pin_memory=True)
    assert first.is_pinned() and first.cuda(non_blocking=True).tolist() == [0, 1, 2, 3]


@check
def types_of_cuda_are_on_the_device() -> None:
    tensors = [
        torch.cuda.FloatTensor([1, 2]),
        torch.ones(2).type("torch.cuda.FloatTensor"),
        torch.ones(2).type(torch.cuda.IntTensor),
    ]
    assert all(tensor.device.type == "second" for tensor in tensors) and tensors[2].dtype == torch.int32
    torch.set_default_tensor_type("torch.cuda.FloatTensor")
    assert torch.zeros(2).device.type == "second"
    torch.set_default_tensor_type("torch.FloatTensor")
    assert torch.zeros(2).device.type == "cpu"


def outcome(check: Check) -> str:
    """What went wrong; "" if nothing did."""
    try:
        check()
    except Exception:  # noqa: BLE001 a check may do anything
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    print(json.dumps({question.__name__: outcome(question) for question in CHECKS}))
