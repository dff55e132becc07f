"""What is known of a GPU refuses a compile before it is begun, with the reason."""

from __future__ import annotations

import pytest
import torch

from torchspan.jobs.budget import Budget
from torchspan.regions.gpu import Gpu, refusal
from torchspan.regions.settings import Settings
from torchspan.strategies._compile import compile_bounded

H200 = Gpu("cuda", "NVIDIA H200", (9, 0), "3.4.0", frozenset({"sm_80", "sm_90a"}))


@pytest.mark.parametrize(
    ("gpu", "settings", "reason"),
    [
        (H200, Settings(), None),
        (H200, Settings("cudagraphs"), None),
        (Gpu("cpu"), Settings(), None),
        (Gpu("cuda", "NVIDIA H200", (9, 0)), Settings("aot_eager"), None),
        (Gpu("cuda", "NVIDIA H200", (9, 0)), Settings(), "Triton is not installed"),
        (Gpu("cuda", "GB10", (12, 1), "3.4.0", frozenset({"sm_90a"})), Settings(), "no ptxas here assembles for sm_121 (GB10)"),
        (Gpu("cuda", "Tesla P100", (6, 0), "3.4.0"), Settings(), "need compute capability 7.0; Tesla P100 has 6.0"),
        (Gpu("mps"), Settings("cudagraphs"), "the inputs are on mps"),
    ],
)
def test_what_stands_in_the_way_is_said(gpu: Gpu, settings: Settings, reason: str | None) -> None:
    actual = refusal(gpu, settings)
    assert actual is None if reason is None else reason in str(actual)


def test_a_refused_compile_is_skipped_and_the_program_goes_on() -> None:
    compiled = compile_bounded(torch.nn.Linear(2, 2), backend="cudagraphs", wait=True, budget=Budget(seconds=60))
    x = torch.ones(1, 2)
    assert torch.equal(compiled(x), compiled._orig_mod(x))
    attempts = compiled.report.attempts
    assert {attempt.outcome for attempt in attempts} == {"skipped"}
    assert "and the inputs are on cpu" in str(attempts[0].cause)
