"""MPS has no double precision: there, single takes its place, and the report says so; on other devices nothing changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from device_modes import in_mode
from torchspan.core.errors import UnsupportedError
from torchspan.environment.facts import Facts

ONES = torch.ones(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "subject"),
    [
        (lambda: torch.zeros(2, dtype=torch.float64, device="cuda"), "torch.zeros(torch.float64)"),
        (lambda: torch.ones(2, dtype=torch.complex128, device="cuda"), "torch.ones(torch.complex128)"),
        (lambda: ONES.cuda(), "Tensor.to(torch.float64)"),
        (lambda: ONES.to("cuda"), "Tensor.to(torch.float64)"),
        (lambda: torch.ones(2).to("cuda", torch.float64), "Tensor.to(torch.float64)"),
        (lambda: torch.nn.Linear(2, 2).double().to("cuda"), "Tensor.to(torch.float64)"),
    ],
)
def test_on_mps_double_precision_becomes_single_and_is_reported(call: Callable[[], object], subject: str) -> None:
    with in_mode(facts=Facts(has_mps=True)) as environment:
        if torch.backends.mps.is_available():
            call()
        else:  # the request has gone to MPS, which is not here
            with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)mps"):
                call()
    results = {decision.subject: (decision.choice, decision.reason) for decision in environment.report.decisions}
    narrow = "torch.complex64" if "complex" in subject else "torch.float32"
    assert results[subject] == (narrow, "MPS has no double precision")


def test_on_the_cpu_it_stays_double() -> None:
    with in_mode() as environment:
        assert ONES.cuda().dtype == torch.zeros(2, dtype=torch.float64, device="cuda").dtype == torch.float64
    assert not any("precision" in decision.reason for decision in environment.report.decisions)


def test_strict_refuses() -> None:
    with in_mode("strict", Facts(has_mps=True)), pytest.raises(UnsupportedError):
        ONES.cuda()
