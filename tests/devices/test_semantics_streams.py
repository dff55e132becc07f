"""``cuda-semantics``: the random streams of the two devices, and where the program is told that its tensors lie."""

from __future__ import annotations

import io
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from device_modes import TWO, in_mode, on_gpu
from torchspan.core.report import Report
from torchspan.devices._base import device_patches
from torchspan.environment.facts import Facts

# random streams


def test_draws_of_the_cpu_do_not_follow_those_of_the_device(followed: Report) -> None:
    torch.manual_seed(0)
    alone = [torch.rand(3), torch.rand(3)]
    torch.manual_seed(0)
    torch.cuda.manual_seed(1)
    first = torch.rand(3)
    on_device = [
        torch.randn(3, device="cuda"),
        nn.Dropout()(on_gpu(8)),
        on_gpu(3).uniform_(),
        nn.Linear(3, 2, device="cuda").weight,
    ]
    assert {tensor.device.type for tensor in on_device} == {"cuda"}
    assert torch.equal(first, alone[0]) and torch.equal(torch.rand(3), alone[1])


def drawn() -> torch.Tensor:
    return torch.rand(3, device="cuda").cpu()


def test_every_seed_and_state_of_cuda_reaches_the_devices_stream(followed: Report) -> None:
    torch.cuda.manual_seed(1)
    state = torch.cuda.get_rng_state()
    expected = drawn()
    again = []
    for restart in (
        lambda: torch.cuda.manual_seed_all(1),
        lambda: torch.manual_seed(1),
        lambda: torch.cuda.set_rng_state(state),
        lambda: torch.cuda.default_generators[0].manual_seed(1),
    ):
        drawn()
        restart()
        again.append(drawn())
    assert all(torch.equal(tensor, expected) for tensor in again)
    assert torch.equal(torch.rand(3, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).cpu(), expected)
    assert torch.cuda.initial_seed() == 1


def test_fork_rng_gives_the_devices_stream_back(followed: Report) -> None:
    before = torch.cuda.get_rng_state()
    with torch.random.fork_rng():
        drawn()
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("is_reentrant", [True, False])
def test_checkpointing_draws_the_same_dropout_again(followed: Report, is_reentrant: bool) -> None:
    x = on_gpu(64).requires_grad_()
    y = checkpoint(lambda x: F.dropout(x, 0.5), x, use_reentrant=is_reentrant)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad.cpu(), y.detach().cpu())


# where things lie


def test_the_program_is_told_where_each_tensor_would_lie(followed: Report) -> None:
    x = on_gpu(2, 3).requires_grad_()
    y = (x * 2).sum()
    y.backward()
    assert x.grad is not None and x.is_cuda
    there = [x, y, x[0], x.grad, x.detach(), torch.zeros_like(x), x.new_zeros(2), torch.ones(2).to(x.device), x.unbind()[1]]
    here = [x.cpu(), torch.ones(2), x.cpu() * 2, torch.get_rng_state(), torch.from_numpy(x.detach().cpu().numpy())]
    assert [tensor.device.type for tensor in there] == ["cuda"] * len(there)
    assert [tensor.device.type for tensor in here] == ["cpu"] * len(here)


def test_a_saved_tensor_says_where_it_was_and_is_loaded_there(followed: Report) -> None:
    file = io.BytesIO()
    torch.save({"there": on_gpu(2), "here": torch.ones(2)}, file)
    places = {}
    for location in (None, "cpu", "cuda"):
        file.seek(0)
        places[location] = [tensor.device.type for tensor in torch.load(file, map_location=location).values()]
    assert places == {None: ["cuda", "cpu"], "cpu": ["cpu", "cpu"], "cuda": ["cuda", "cuda"]}


def test_the_end_of_the_mode_leaves_torch_as_it_was() -> None:
    with in_mode("cuda-semantics"):
        x = on_gpu(3)
        assert x.is_cuda
    assert torch.equal(x + torch.ones(3), torch.full((3,), 2.0)) and x.numpy().sum() == 3
    assert torch._C._len_torch_dispatch_stack() == 0


def test_torch_compile_runs_eagerly_and_the_report_says_so(followed: Report) -> None:
    double = torch.compile(lambda x: x * 2, backend="eager")
    assert double(on_gpu(3)).is_cuda
    with pytest.raises(RuntimeError, match=re.escape(TWO)):
        torch.compile(lambda x, y: x + y, backend="eager")(on_gpu(3), torch.ones(3))
    assert [decision.choice for decision in followed.decisions if decision.subject == "torch.compile"] == ["eager", "eager"]


def test_where_cuda_is_here_nothing_is_patched() -> None:
    assert device_patches(Facts(num_cuda=1), "cuda-semantics") == []
