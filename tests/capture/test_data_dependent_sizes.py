"""Sizes that depend on data, as expert parallelism has them: one capture serves every batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchspan.capture._state import BoundGraph
from torchspan.capture.joint import capture_joint, is_supported
from torchspan.capture.train_step import capture_train_step
from torchspan.core.graph import Graph
from torchspan.core.program import Program

CAPTURES = [capture_train_step, *([capture_joint] if is_supported() else [])]


# What a rank receives, played by one rank: the first `num_rows` tokens in an order of theirs.
@torch.library.custom_op("torchspan_sizes_test::receive", mutates_args=())
def receive(x_BD: Tensor, order_B: Tensor, num_rows: int) -> Tensor:
    rows_ND = x_BD.new_empty((num_rows, x_BD.shape[1]))
    return rows_ND.copy_(x_BD[order_B[:num_rows]])


@receive.register_fake
def _(x_BD: Tensor, order_B: Tensor, num_rows: int) -> Tensor:
    return x_BD.new_empty((num_rows, x_BD.shape[1]))


@torch.library.custom_op("torchspan_sizes_test::send_back", mutates_args=())
def send_back(rows_ND: Tensor, order_B: Tensor) -> Tensor:
    x_BD = rows_ND.new_zeros((order_B.shape[0], rows_ND.shape[1]))
    x_BD[order_B[: rows_ND.shape[0]]] = rows_ND
    return x_BD


@send_back.register_fake
def _(rows_ND: Tensor, order_B: Tensor) -> Tensor:
    return rows_ND.new_empty((order_B.shape[0], rows_ND.shape[1]))


class Receive(torch.autograd.Function):
    """The rows that come; their gradients go back."""

    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, order_B: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(order_B)
        return receive(x_BD, order_B, num_rows)

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor) -> Any:  # type: ignore[override]
        return send_back(gradient_ND, *ctx.saved_tensors), None, None


class SendBack(torch.autograd.Function):
    """The rows go back; as many gradients come."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, order_B: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(order_B)
        ctx.num_rows = num_rows
        return send_back(rows_ND, order_B)

    @staticmethod
    def backward(ctx: Any, gradient_BD: Tensor) -> Any:  # type: ignore[override]
        return receive(gradient_BD.contiguous(), *ctx.saved_tensors, ctx.num_rows), None, None


class Expert(nn.Module):
    """Tokens of one expert, permuted, multiplied, gated and sent back; what it has seen is counted."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(8, 4))
        self.gate = nn.Parameter(torch.randn(4))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("sums", torch.zeros(2, 4))

    def forward(self, x_BD: Tensor, is_mine_B: Tensor) -> Tensor:
        torch._assert_async(x_BD[0, 0] < 100, "a token is too large")
        num_rows = is_mine_B.sum().item()
        torch._check(num_rows >= 0)
        torch._check(num_rows <= 11, lambda: "more rows than the buffer holds")
        order_B = torch.argsort(is_mine_B, descending=True, stable=True)
        rows_ND = Receive.apply(x_BD * self.gate, order_B, num_rows)
        permutation_N = torch.arange(num_rows, device=x_BD.device).flip(0)
        hidden_NF = nn.functional.silu(rows_ND[permutation_N] @ self.up).view(-1, 8)
        rows_ND = (hidden_NF @ self.down)[permutation_N]
        with torch.no_grad():
            self.seen += num_rows
            self.sums[1] = rows_ND.sum(0)
        return (x_BD + SendBack.apply(rows_ND, order_B, num_rows)).square().mean()


def _batch(num_mine: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    is_mine_B = torch.arange(12) < num_mine
    return torch.randn(12, 4, generator=draw), is_mine_B[torch.randperm(12, generator=draw)]


@pytest.fixture(scope="module", params=CAPTURES, ids=lambda capture: capture.__name__.removeprefix("capture_"))
def graph(request: pytest.FixtureRequest) -> Graph:
    capture: Callable[[Program], Graph] = request.param
    return capture(Program(Expert(), _batch(7, 0)))


def test_one_capture_serves_batches_of_any_count_bitwise(graph: Graph) -> None:
    eager, captured = Expert(), Expert()
    step = BoundGraph(graph, captured)
    for seed, num_mine in enumerate((7, 3, 0, 11, 1)):
        batch = _batch(num_mine, seed)
        eager.zero_grad()
        loss = eager(*batch)
        loss.backward()
        assert torch.equal(step(*batch), loss), num_mine
        for name, parameter in eager.named_parameters():
            assert torch.equal(captured.get_parameter(name).grad, parameter.grad), (num_mine, name)  # type: ignore[arg-type]
        assert torch.equal(captured.seen, eager.seen) and torch.equal(captured.sums, eager.sums)  # type: ignore[arg-type]


def test_the_count_is_read_once_from_the_batch_and_is_no_number(graph: Graph) -> None:
    reads = [name for name in graph.count_targets().elements() if "_local_scalar_dense" in name or ".item" in name]
    assert len(reads) == 1, reads
    numbers = [
        number
        for node in graph.module.graph.nodes
        for number in torch.utils._pytree.tree_leaves((node.args, node.kwargs))
        if type(number) is int and number == 7
    ]
    assert numbers == []
    unused = [node for node in graph.module.graph.nodes if node.op == "call_function" and not node.users]
    assert all("assert" in str(node.target) for node in unused), unused


def test_what_the_program_checks_of_a_size_is_checked_at_every_step(graph: Graph) -> None:
    step = BoundGraph(graph, Expert())
    with pytest.raises(RuntimeError, match=r"Runtime assertion failed for expression u\d <= 11"):
        step(*_batch(12, 0))
    x_BD, is_mine_B = _batch(3, 0)
    with pytest.raises(RuntimeError, match="a token is too large"):
        step(x_BD + 1000, is_mine_B)
