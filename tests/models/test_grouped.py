"""The grouped product against a loop written out."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from torchspan.core.errors import InputError
from torchspan.models._grouped import DTYPES, grouped_mm

COUNTS = [[3, 1, 2], [0, 6, 0], [0, 0, 0], [6, 0, 0]]


def _arguments(counts: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x_ND = torch.randn(sum(counts), 5, generator=draw, dtype=torch.float64).to(dtype)
    w_EDF = torch.randn(len(counts), 5, 4, generator=draw, dtype=torch.float64).to(dtype)
    return x_ND.requires_grad_(), w_EDF.requires_grad_(), torch.tensor(counts)


def _by_hand(x_ND: Tensor, w_EDF: Tensor, counts_E: Tensor) -> Tensor:
    expert_N = torch.repeat_interleave(torch.arange(len(counts_E)), counts_E)
    return torch.stack([row @ w_EDF[expert] for row, expert in zip(x_ND, expert_N)]) if len(x_ND) else x_ND @ w_EDF[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_product_and_gradients_are_those_of_a_loop_over_rows(counts: list[int], dtype: torch.dtype) -> None:
    x_ND, w_EDF, counts_E = _arguments(counts, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x_ND, w_EDF)]
    y_NF, exact_NF = grouped_mm(x_ND, w_EDF, counts_E), _by_hand(*exact, counts_E)
    torch.testing.assert_close(y_NF, exact_NF.to(dtype))
    grad_NF = torch.randn(y_NF.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(y_NF, (x_ND, w_EDF), grad_NF)
    for gradient, exact_gradient in zip(gradients, torch.autograd.grad(exact_NF, exact, grad_NF.double())):
        torch.testing.assert_close(gradient, exact_gradient.to(dtype))
    assert all(not gradients[1][expert].any() for expert, count in enumerate(counts) if not count)


@pytest.mark.parametrize("counts", [[3, 1, 2], [0, 4, 0]], ids=str)
def test_first_and_second_derivatives_are_those_of_finite_differences(counts: list[int]) -> None:
    x_ND, w_EDF, counts_E = _arguments(counts, torch.float64)
    assert torch.autograd.gradcheck(grouped_mm, (x_ND, w_EDF, counts_E))
    assert torch.autograd.gradgradcheck(grouped_mm, (x_ND, w_EDF, counts_E))


def test_a_traced_step_holds_one_node_a_product_and_gives_the_same_bits() -> None:
    def step(x_ND: Tensor, w_EDF: Tensor, counts_E: Tensor) -> tuple[Tensor, ...]:
        x_ND, w_EDF = x_ND.detach().requires_grad_(), w_EDF.detach().requires_grad_()
        return torch.autograd.grad(grouped_mm(x_ND, w_EDF, counts_E).square().sum(), (x_ND, w_EDF))

    traced = make_fx(step, tracing_mode="fake")(*_arguments([3, 1, 2], torch.float32))
    operators = torch.ops.torchspan
    for operator, times in ((operators.grouped_rows_mm.default, 2), (operators.grouped_rows_mm_weight.default, 1)):
        assert sum(node.target is operator for node in traced.graph.nodes) == times
    for counts in COUNTS[:2]:
        arguments = _arguments(counts, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(traced(*arguments), step(*arguments)))


def test_a_number_of_rows_that_is_not_known_is_left_alone() -> None:
    def product(mask_N: Tensor, x_ND: Tensor, w_EDF: Tensor, counts_E: Tensor) -> tuple[Tensor, ...]:
        rows_ND = x_ND[mask_N.nonzero().squeeze(1)].detach().requires_grad_()
        w_EDF = w_EDF.detach().requires_grad_()
        y_NF = grouped_mm(rows_ND, w_EDF, counts_E)
        return y_NF, *torch.autograd.grad(y_NF.sum(), (rows_ND, w_EDF))

    x_ND, w_EDF, _ = _arguments([3, 1, 2], torch.float32)
    mask_N = torch.tensor([True, False, True, True, False, False])
    traced = make_fx(product, tracing_mode="symbolic")(mask_N, x_ND, w_EDF, torch.tensor([1, 2, 0]))
    fewer_N, counts_E = torch.tensor([False, False, False, False, True, False]), torch.tensor([0, 0, 1])
    for mask, counts in ((mask_N, torch.tensor([1, 2, 0])), (fewer_N, counts_E), (mask_N & False, torch.zeros_like(counts_E))):
        expected = product(mask, x_ND, w_EDF, counts)
        assert all(torch.equal(a, b) for a, b in zip(traced(mask, x_ND, w_EDF, counts), expected))


X_ND, W_EDF, COUNTS_E = torch.ones(3, 5), torch.ones(2, 5, 4), torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X_ND[0], W_EDF, COUNTS_E), r"rows have 1 dimensions, weights 3, counts 1; expected 2 \(rows, width\)"),
        ((X_ND[:, :4], W_EDF, COUNTS_E), "rows are 4 wide, the experts' weights take 5; expected the same width"),
        ((X_ND, W_EDF, COUNTS_E[:1]), "there are 1 counts for 2 experts' weights; expected one for each"),
        ((X_ND.half(), W_EDF.half(), COUNTS_E), "rows are torch.float16, weights torch.float16; expected the same of float32"),
        ((X_ND, W_EDF.double(), COUNTS_E), "rows are torch.float32, weights torch.float64; expected the same"),
        ((X_ND, W_EDF, COUNTS_E.int()), "counts are torch.int32; expected torch.int64"),
        (
            (X_ND, W_EDF, torch.tensor([1, 1])),
            r"counts are \[1, 1\], there are 3 rows; expected counts of 0 or more that add up",
        ),
        ((X_ND, W_EDF, torch.tensor([-1, 4])), r"counts are \[-1, 4\], there are 3 rows"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple[Tensor, Tensor, Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        grouped_mm(*arguments)


def test_a_product_does_not_import_the_compilers_front_end(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    run_python("""
        import sys, torch
        from torchspan.models._grouped import grouped_mm
        grouped_mm(torch.ones(3, 5, requires_grad=True), torch.ones(2, 5, 4), torch.tensor([1, 2])).sum().backward()
        assert "torch._dynamo" not in sys.modules
    """)
