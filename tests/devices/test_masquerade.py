"""In disguise, the program is told that its tensors are on the device that it asked for; torch is told the truth."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from device_modes import in_mode
from torchspan.core.report import Report

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")


@pytest.fixture
def disguised() -> Iterator[Report]:
    with in_mode(masquerade=True) as environment:
        yield environment.report


def where(tensor: torch.Tensor) -> str:
    """What it answers, all answers agreeing."""
    kind = tensor.device.type
    assert type(tensor.device) is torch.device
    assert tensor.is_cuda == (kind == "cuda") and tensor.is_cpu == (kind == "cpu")
    assert tensor.get_device() == (0 if kind == "cuda" else -1)
    assert tensor.type().startswith("torch.cuda." if kind == "cuda" else "torch.Float")
    assert tensor.untyped_storage().device.type == kind
    return kind


def test_what_was_made_or_moved_there_and_what_is_computed_from_it_answers_for_the_device(disguised: Report) -> None:
    x = torch.zeros(2, device="cuda")
    for tensor in (
        x,
        x + 1,
        x[:1],
        x.double(),
        torch.ones(2).cuda(),
        torch.ones(2).to("cuda"),
        torch.zeros(2, device=x.device),
    ):
        assert tensor.device == CUDA
    assert where(x) == where(x + 1) == "cuda"


def test_what_was_made_on_the_cpu_or_brought_back_answers_for_the_cpu(disguised: Report) -> None:
    x = torch.zeros(2, device="cuda") + 1
    for tensor in (
        torch.zeros(2),
        torch.tensor([1.0]),
        torch.from_numpy(x.numpy()),
        x.cpu(),
        x.to("cpu"),
        x.to(torch.zeros(2)),
    ):
        assert where(tensor) == "cpu"


def test_what_asks_for_the_cpu_by_name_answers_for_it(disguised: Report) -> None:
    x = torch.zeros(2, device="cuda")
    assert where(torch.zeros_like(x, device="cpu")) == "cpu" and where(torch.zeros_like(x)) == "cuda"
    with torch.device("cuda"):
        assert where(torch.zeros(2, device="cpu")) == "cpu" and where(torch.zeros(2)) == "cuda"


def test_what_is_made_beside_a_tensor_is_where_it_is_unless_a_device_is_named(disguised: Report) -> None:
    there, host = torch.zeros(2, device="cuda"), torch.zeros(2)
    assert where(there.new_zeros(2)) == where(host.new_zeros(2, device="cuda")) == where(there.new_tensor([1.0])) == "cuda"
    assert where(host.new_zeros(2)) == where(there.new_zeros(2, device="cpu")) == where(host.new_tensor([1.0])) == "cpu"
    assert where(host.type_as(there)) == where(host.to(there + 1)) == "cuda" and where(there.type_as(host)) == "cpu"
    model = torch.nn.Linear(2, 2).to(there)
    assert where(model.weight) == where(torch.nn.Linear(2, 2, device="meta").to_empty(device="cuda").weight) == "cuda"


def test_old_constructors_and_types_tell_the_host_from_the_device(disguised: Report) -> None:
    there, host = torch.zeros(2, device="cuda"), torch.zeros(2)
    assert where(torch.Tensor([1.0])) == where(torch.FloatTensor([1.0])) == where(torch.Tensor(2, 3)) == "cpu"
    assert where(torch.cuda.FloatTensor([1.0])) == where(host.type(torch.cuda.FloatTensor)) == "cuda"
    assert where(there.type(torch.FloatTensor)) == "cpu"
    for tensor, of_cuda in ((there, True), (host, False)):
        assert isinstance(tensor, torch.cuda.FloatTensor) == of_cuda and isinstance(tensor, torch.FloatTensor) != of_cuda
        assert not isinstance(tensor, torch.cuda.HalfTensor)
    pinned = host.pin_memory()
    assert where(pinned) == where(torch.empty(2, pin_memory=True)) == "cpu" and pinned.is_pinned()
    with pytest.raises(RuntimeError, match="cannot pin"):
        there.pin_memory()


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_storages_generators_and_packed_sequences_answer_too(disguised: Report) -> None:
    there, host = torch.zeros(3, 2, device="cuda"), torch.zeros(3, 2)
    assert there.storage().is_cuda and there.storage().device == there.untyped_storage().device == CUDA
    assert host.untyped_storage().device == CPU and host.untyped_storage().cuda().device == CUDA
    assert torch.UntypedStorage(4, device="cuda").get_device() == 0 and torch.UntypedStorage(4).device == CPU
    generator = torch.Generator("cuda")
    assert generator.device == CUDA and torch.Generator().device == CPU
    assert torch.rand(2, device="cuda", generator=generator).is_cuda
    packed = torch.nn.utils.rnn.pack_sequence([there, there[:2]])
    padded, lengths = torch.nn.utils.rnn.pad_packed_sequence(packed)
    assert packed.is_cuda and padded.is_cuda and packed.batch_sizes.device == lengths.device == CPU
    assert not packed.cpu().is_cuda and packed.cpu().to("cuda").is_cuda


def test_a_move_copies_as_it_would_on_a_gpu(disguised: Report) -> None:
    x = torch.zeros(2, device="cuda") + 1
    back = x.cpu()
    back[0] = 9
    assert x[0] == 1
    there = torch.ones(2, device="cuda")
    assert there.cuda() is there and there.to(CUDA) is there
    computed = torch.ones(2).clone()  # of the host, although it answers for the device: not aliased
    computed.to("cuda").zero_()
    assert computed.sum() == 2
    host = torch.zeros(2)
    assert host.to("cpu") is host and host.cpu() is host
    host.cuda()[0] = 9
    assert host[0] == 0


def test_a_model_trains_and_all_of_it_answers_for_the_device(disguised: Report) -> None:
    model = torch.nn.Linear(2, 2)
    assert where(model.weight) == "cpu"
    model.cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.is_autocast_enabled()
        loss = model(torch.ones(2, 2, device="cuda")).sum()
    loss.backward()
    optimizer.step()
    state = optimizer.state[model.weight]["exp_avg"]
    assert where(model.weight) == where(model.weight.grad) == where(state) == "cuda" and loss.is_cuda  # type: ignore[arg-type]


def test_torch_itself_is_told_the_truth(disguised: Report) -> None:
    x = torch.zeros(2, device="cuda")
    assert "cuda" not in repr(x)
    attention = torch.nn.MultiheadAttention(4, 2, device="cuda")  # asks in torch's own code which kernels there are
    assert where(attention(*[torch.zeros(1, 3, 4, device="cuda")] * 3)[0]) == "cuda"
    assert torch.isfinite(torch.nn.utils.clip_grad_norm_([x.requires_grad_()], 1.0))


def test_a_pickle_and_a_copy_are_the_truth_for_torch_and_load_without_torchspan(tmp_path: Path) -> None:
    with in_mode(masquerade=True):
        x = torch.zeros(2, device="cuda")
        assert where(copy.deepcopy(x)) == "cuda"
        torch.save(x, tmp_path / "x.pt")
        assert where(torch.load(tmp_path / "x.pt", map_location="cpu")) == "cpu"
        assert where(torch.load(tmp_path / "x.pt", map_location="cuda")) == "cuda"
        pickled = pickle.dumps(x)
    assert x.device == CPU and not x.is_cuda
    assert pickle.loads(pickled).device == torch.load(tmp_path / "x.pt").device == CPU


def test_compiled_code_is_told_the_same_without_a_graph_break(disguised: Report) -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def function(x: torch.Tensor) -> torch.Tensor:
        assert x.device.type == "cuda"
        return torch.nn.functional.relu(x) + (torch.ones(2, device=x.device) if x.is_cuda else torch.zeros(2))

    assert function(torch.zeros(2, device="cuda")).tolist() == [1, 1]


def test_streams_in_compiled_code_are_those_of_the_program(disguised: Report) -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def function(x: torch.Tensor, side: torch.cuda.Stream) -> torch.Tensor:
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            y = x * 2
        current.wait_stream(side)
        return y + 1

    assert function(torch.ones(2, device="cuda"), torch.cuda.Stream()).tolist() == [3, 3]


def test_other_threads_are_told_the_same(disguised: Report) -> None:
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(where(torch.zeros(2, device="cuda") + 1)))
    thread.start()
    thread.join()
    assert answers == ["cuda"]


def test_the_default_device_is_the_one_that_was_asked_for(disguised: Report) -> None:
    with torch.device("cuda"):
        assert torch.get_default_device().type == where(torch.zeros(2)) == "cuda"
    assert torch.get_default_device() == CPU and where(torch.zeros(2)) == "cpu"


def test_without_it_a_tensor_answers_truthfully() -> None:
    with in_mode():
        assert torch.zeros(2, device="cuda").device == CPU
