"""``cuda-semantics``: what raises on CUDA raises here, in torch's words; what runs has the default mode's numbers."""

from __future__ import annotations

import copy
import io
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from device_modes import TWO, in_mode, on_gpu
from torchspan.core.report import Report
from torchspan.core.topics import Standing


def other(name: str, kernel: str, here: str = "cpu", there: str = "cuda:0") -> str:
    return (
        f"Expected all tensors to be on the same device, but got {name} is on {here}, different from other tensors on {there} "
        f"(when checking argument in method wrapper_CUDA_{kernel})"
    )


# wrong programs


class Doubled(torch.autograd.Function):
    """Its gradient is made on the host, wherever its argument lies."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return torch.full(tuple(grad.shape), 2.0)


def add_in_place() -> None:
    total = torch.zeros(())
    total += on_gpu(3).sum()


def loss_of_a_batch_that_was_not_moved() -> None:
    model = nn.Linear(3, 2).cuda()
    for x, y in DataLoader(TensorDataset(torch.ones(4, 3), torch.zeros(4, dtype=torch.long)), batch_size=2):
        F.cross_entropy(model(x.cuda()), y)


def a_hidden_state_that_was_not_moved() -> None:
    nn.GRUCell(3, 3).cuda()(on_gpu(2, 3), torch.zeros(2, 3))


def a_constant_of_the_model() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = torch.ones(3)  # no buffer: .cuda() leaves it

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.shift

    Shifted().cuda()(on_gpu(2, 3))


def shuffling_under_a_default_device() -> None:
    with torch.device("cuda"):
        list(DataLoader(TensorDataset(torch.ones(4, device="cpu")), shuffle=True, generator=torch.Generator()))
        torch.randperm(3, generator=torch.Generator())


def a_gradient_of_the_wrong_device() -> None:
    Doubled.apply(on_gpu(3).requires_grad_()).sum().backward()


def assigned_gradient() -> None:
    on_gpu(3).requires_grad_().grad = torch.ones(3)


def in_a_thread() -> None:
    raised: list[BaseException] = []

    def work() -> None:
        try:
            on_gpu(3) + torch.ones(3)
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    raise raised[0]


def loaded_to_the_host() -> None:
    file = io.BytesIO()
    torch.save(on_gpu(3), file)
    file.seek(0)
    torch.load(file, map_location="cpu") + on_gpu(3)


WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "add": (lambda: torch.ones(3, device="cuda") + torch.ones(3), RuntimeError, TWO),
    "a CPU batch": (lambda: nn.Linear(3, 2).cuda()(torch.ones(2, 3)), RuntimeError, other("mat1", "addmm")),
    "a generator of the CPU": (
        lambda: torch.randn(3, generator=torch.Generator(), device="cuda"),
        RuntimeError,
        "Expected a 'cuda' device type for generator but found 'cpu'",
    ),
    "numpy": (
        lambda: on_gpu(3).numpy(),
        TypeError,
        "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.",
    ),
    "asarray": (lambda: numpy.asarray(on_gpu(3) * 2), TypeError, "can't convert cuda:0 device type tensor to numpy."),
    "a generator of the device": (
        lambda: torch.ones(3).normal_(generator=torch.Generator("cuda")),
        RuntimeError,
        "Expected a 'cpu' device type for generator but found 'cuda'",
    ),
    "dropout's generator": (
        lambda: torch.bernoulli(on_gpu(3) / 2, generator=torch.Generator()),
        RuntimeError,
        "Expected a 'cuda' device type for generator but found 'cpu'",
    ),
    "in place": (lambda: torch.ones(3).add_(on_gpu(3)), RuntimeError, TWO),
    "a sum on the host": (add_in_place, RuntimeError, TWO),
    "a result": (lambda: (on_gpu(3) * 2).relu() * torch.ones(3), RuntimeError, TWO),
    "a view": (lambda: on_gpu(2, 3)[0].view(3, 1) - torch.ones(3, 1), RuntimeError, TWO),
    "mse_loss": (lambda: F.mse_loss(on_gpu(3), torch.ones(3)), RuntimeError, TWO),
    "cross entropy": (loss_of_a_batch_that_was_not_moved, RuntimeError, other("target", "nll_loss_forward")),
    "embedding": (
        lambda: nn.Embedding(4, 2).cuda()(torch.tensor([1])),
        RuntimeError,
        other("index", "_index_select"),
    ),
    "index_select": (lambda: on_gpu(3).index_select(0, torch.tensor([1])), RuntimeError, other("index", "_index_select")),
    "gather": (lambda: on_gpu(3).gather(0, torch.tensor([1])), RuntimeError, other("index", "gather")),
    "cat": (lambda: torch.cat([on_gpu(3), torch.ones(3)]), RuntimeError, other("tensors", "cat")),
    "stack of losses": (lambda: torch.stack([on_gpu(3).sum(), torch.tensor(1.0)]), RuntimeError, other("tensors", "cat")),
    "matmul": (lambda: on_gpu(2, 3) @ torch.ones(3, 2), RuntimeError, other("mat2", "mm")),
    "bmm": (
        lambda: torch.ones(1, 2, 3).bmm(on_gpu(1, 3, 2)),
        RuntimeError,
        other("mat2", "bmm", "cuda:0", "cpu"),
    ),
    "layer norm": (
        lambda: nn.LayerNorm(3).cuda()(torch.ones(2, 3)),
        RuntimeError,
        other("weight", "_native_layer_norm", "cuda:0", "cpu"),
    ),
    "convolution of a CPU image": (
        lambda: nn.Conv2d(1, 1, 1).cuda()(torch.ones(1, 1, 2, 2)),
        RuntimeError,
        "Input type (torch.FloatTensor) and weight type (torch.cuda.FloatTensor) should be the same or input should be a "
        "MKLDNN tensor and weight is a dense tensor",
    ),
    "convolution by a CPU model": (
        lambda: nn.Conv2d(1, 1, 1)(on_gpu(1, 1, 2, 2)),
        RuntimeError,
        "Input type (torch.cuda.FloatTensor) and weight type (torch.FloatTensor) should be the same",
    ),
    "a CPU tensor by an index of the device": (
        lambda: torch.ones(3)[torch.tensor([1], device="cuda")],
        RuntimeError,
        "indices should be either on cpu or on the same device as the indexed tensor (cpu)",
    ),
    "values of an assignment": (lambda: on_gpu(3).index_put_((torch.tensor([0, 1]),), torch.ones(2)), RuntimeError, TWO),
    "mask": (
        lambda: on_gpu(3).masked_fill(torch.tensor([True, False, True]), 0.0),
        RuntimeError,
        "expected self and mask to be on the same device, but got mask on cpu and self on cuda:0",
    ),
    "where": (lambda: torch.where(on_gpu(3) > 0, on_gpu(3), torch.zeros(3)), RuntimeError, TWO),
    "attention": (
        lambda: F.scaled_dot_product_attention(on_gpu(1, 1, 2, 4), torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4)),
        RuntimeError,
        "Expected query, key, and value to have the same device type, but got query.device: cuda:0 key.device: cpu and "
        "value.device: cpu instead.",
    ),
    "lengths on the device": (
        lambda: nn.utils.rnn.pack_padded_sequence(on_gpu(2, 3, 1), torch.tensor([3, 2], device="cuda"), batch_first=True),
        RuntimeError,
        "'lengths' argument should be a 1D CPU int64 tensor, but got 1D cuda:0 Long tensor",
    ),
    "a recurrent model": (
        lambda: nn.LSTM(3, 2).cuda()(torch.ones(4, 1, 3)),
        RuntimeError,
        "Input and parameter tensors are not at the same device, found input tensor at cpu and parameter tensor at cuda:0",
    ),
    "a hidden state": (a_hidden_state_that_was_not_moved, RuntimeError, "Expected all tensors to be on the same device"),
    "a constant": (a_constant_of_the_model, RuntimeError, TWO),
    "a default device": (
        shuffling_under_a_default_device,
        RuntimeError,
        "Expected a 'cuda' device type for generator but found 'cpu'",
    ),
    "a gradient that is given": (
        lambda: (on_gpu(3).requires_grad_() * 2).backward(torch.ones(3)),
        RuntimeError,
        "invalid gradient at index 0 - expected device cuda:0 but got cpu",
    ),
    "a function's gradient": (
        a_gradient_of_the_wrong_device,
        RuntimeError,
        "Function DoubledBackward returned an invalid gradient at index 0 - expected device cuda:0 but got cpu",
    ),
    "a gradient that is assigned": (
        assigned_gradient,
        RuntimeError,
        "attempting to assign a gradient with device type 'cpu' to a tensor with device type 'cuda'. "
        "Please ensure that the gradient and the tensor are on the same device",
    ),
    "a thread": (in_a_thread, RuntimeError, TWO),
    "map_location": (loaded_to_the_host, RuntimeError, TWO),
    "pinned": (
        lambda: on_gpu(3).pin_memory(),
        RuntimeError,
        "cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned",
    ),
    "out": (lambda: torch.add(on_gpu(3), 1, out=torch.empty(3)), RuntimeError, TWO),
    "optimizer's list": (lambda: torch._foreach_add([on_gpu(2)], [torch.ones(2)]), RuntimeError, TWO),
    "two numbers": (
        lambda: torch.addcmul(on_gpu(3), torch.tensor(1.0), torch.tensor(1.0)),
        RuntimeError,
        "Trying to pass too many CPU scalars to non-CPU kernel!",
    ),
}


@pytest.mark.usefixtures("followed_throughout")
class TestWrongPrograms:
    @pytest.mark.parametrize("name", WRONG)
    def test_what_raises_on_cuda_raises_here_in_torchs_words(self, name: str) -> None:
        program, kind, text = WRONG[name]
        with pytest.raises(kind, match=re.escape(text)):
            program()


def test_what_would_fail_is_on_the_report_with_the_programs_line(followed: Report) -> None:
    with pytest.raises(RuntimeError):
        on_gpu(3) + torch.ones(3)
    (decision,) = [decision for decision in followed.decisions if decision.standing is Standing.UNSUPPORTED]
    assert decision.subject == "aten::add" and str(decision.site).startswith(__file__)


def test_where_a_mark_was_lost_a_copy_from_the_host_is_not_taken_for_one(followed: Report) -> None:
    weight = on_gpu(3)
    del weight.untyped_storage()._torchspan_memory  # as torch 2.8's garbage collection may
    weight.copy_(torch.ones(3))
    torch._foreach_copy_([weight], [torch.ones(3)])
    assert (weight + on_gpu(3)).is_cuda


# right programs


def trained(optimizer: Callable[..., torch.optim.Optimizer], **options: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2))
    data = TensorDataset(torch.randn(8, 3), torch.arange(8) % 2)
    model.cuda()
    steps = optimizer(model.parameters(), lr=0.1, **options)
    for x, y in DataLoader(data, batch_size=4, pin_memory=True):
        x, y = x.to("cuda", non_blocking=True), y.cuda(non_blocking=True)
        loss = F.cross_entropy(model(x), y)
        steps.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        steps.step()
    return [loss, *model.parameters(), *(value for s in steps.state.values() for value in s.values() if value is not None)]


def with_scaler() -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).cuda()
    steps, scaler = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), torch.amp.GradScaler("cuda")
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(on_gpu(4, 3)).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(steps)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(steps)
        scaler.update()
    return [loss, *model.parameters()]


def numbers_on_the_host() -> list[torch.Tensor]:
    x, half = on_gpu(3), torch.tensor(0.5)
    filled = x.clone().fill_(half)
    return [x * half, half - x, x + 1, torch.where(x > 0, half, x), x.masked_fill(x > 0, half), filled, x.clamp(0.0, 0.5)]


def indices_on_the_host() -> list[torch.Tensor]:
    x = torch.arange(6.0).view(3, 2).cuda()
    chosen, rows = x[torch.tensor([0, 2])], x[torch.tensor([True, False, True])]
    x[torch.tensor([1])] = torch.tensor(7.0)
    return [chosen, rows, x]


def loaded() -> list[torch.Tensor]:
    model, file = nn.Linear(3, 2).cuda(), io.BytesIO()
    with torch.no_grad():
        model.weight.fill_(0.5), model.bias.fill_(1.0)
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, map_location="cpu")
    assert {value.device.type for value in state.values()} == {"cpu"}
    on_host = nn.Linear(3, 2)
    on_host.load_state_dict(state)
    model.load_state_dict(state)
    return [on_host(torch.ones(1, 3)), model(on_gpu(1, 3)), copy.deepcopy(model)(on_gpu(1, 3))]


def recurrent() -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.LSTM(3, 4, batch_first=True, bidirectional=True).cuda()
    packed = nn.utils.rnn.pack_padded_sequence(on_gpu(2, 3, 3), torch.tensor([3, 2]), batch_first=True)
    padded, lengths = nn.utils.rnn.pad_packed_sequence(model(packed)[0], batch_first=True)
    padded.sum().backward()
    assert lengths.device.type == "cpu"
    return [padded, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def convolutional() -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 1)).cuda()
    model(torch.randn(2, 1, 6, 6).cuda()).sum().backward()
    return [*model.buffers(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def attending() -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).cuda()
    x = torch.randn(2, 4, 8).cuda().requires_grad_()
    model(x, src_mask=nn.Transformer.generate_square_subsequent_mask(4, device="cuda")).sum().backward()
    hot = F.one_hot(torch.tensor([1, 0], device="cuda"), 3)
    return [x.grad, hot.cumsum(0), torch.einsum("ij,kj->ik", hot, hot)]  # type: ignore[list-item]


def brought_back() -> list[torch.Tensor]:
    x = on_gpu(3) * 3
    host = x.cpu()
    x.zero_()
    array = torch.from_numpy(host.numpy() + 1)
    x.copy_(array)
    return [host, array, x, torch.tensor(x.tolist()), torch.as_tensor([x.sum().item()], device=x.device)]


RIGHT: dict[str, Callable[[], list[torch.Tensor]]] = {
    "SGD": lambda: trained(torch.optim.SGD, momentum=0.9),
    "Adam": lambda: trained(torch.optim.Adam),
    "Adam, capturable": lambda: trained(torch.optim.Adam, capturable=True),
    "AdamW, foreach": lambda: trained(torch.optim.AdamW, foreach=True),
    "AdamW, fused": lambda: trained(torch.optim.AdamW, fused=True),
    "GradScaler": with_scaler,
    "numbers on the host": numbers_on_the_host,
    "indices on the host": indices_on_the_host,
    "state_dict": loaded,
    "packed sequences": recurrent,
    "convolutions": convolutional,
    "attention": attending,
    "there and back": brought_back,
}


@pytest.fixture(scope="module")
def numbers() -> dict[str, dict[str, list[torch.Tensor]]]:
    """What each right program gives, by mode."""
    results = {}
    for mode in ("auto", "cuda-semantics"):
        with in_mode(mode):
            results[mode] = {name: [tensor.detach().cpu() for tensor in program()] for name, program in RIGHT.items()}
    return results


@pytest.mark.parametrize("name", RIGHT)
def test_what_runs_on_cuda_runs_here_with_the_numbers_of_the_default_mode(numbers: dict[str, Any], name: str) -> None:
    for default, followed in zip(numbers["auto"][name], numbers["cuda-semantics"][name], strict=True):
        torch.testing.assert_close(followed, default, rtol=0, atol=0)
