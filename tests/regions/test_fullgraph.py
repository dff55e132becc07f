"""fullgraph=True: a graph break is an error that names the user's line; anything else that goes wrong is an Attempt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torchspan
from torchspan.core.errors import CaptureError
from torchspan.strategies import report_of

Wait = Callable[..., None]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"  # torch 2.13, when inductor is imported
)


def as_it_is(graph: Any, inputs: Any) -> Any:
    return graph.forward


def raises(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("lowering failed")


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        torch._dynamo.graph_break()  # this line
        return x.relu()


def line_of(text: str) -> int:
    with open(__file__) as lines:
        return next(number for number, line in enumerate(lines, 1) if text in line)


def test_with_wait_the_first_call_raises_and_names_the_line() -> None:
    compiled = torchspan.compile(Breaks(), fullgraph=True, backend=as_it_is, strategy="whole", wait=True)
    expected = rf"^Breaks was compiled with fullgraph=True and breaks at {__file__}:{line_of('# this line')}, in forward"
    for _ in range(2):
        with pytest.raises(CaptureError, match=expected):
            compiled(torch.ones(1, 4))
    (attempt,) = compiled.report.attempts
    assert attempt.outcome == "failed"
    assert compiled.report.decisions[-1].choice == "refused"


def test_without_wait_calls_run_eagerly_until_it_is_known_and_no_other_strategy_is_tried(until: Wait) -> None:
    model = nn.Sequential(Breaks(), Breaks())
    compiled, x = torchspan.safe_compile(model, fullgraph=True, backend=as_it_is), torch.ones(1, 4)
    assert torch.equal(compiled(x), model(x))
    until(lambda: bool(report_of(compiled).attempts))
    with pytest.raises(CaptureError, match=r"Sequential was compiled with fullgraph=True and breaks at .*use fullgraph=False"):
        compiled(x)
    assert [attempt.strategy for attempt in report_of(compiled).attempts] == ["whole"]
    assert torch.equal(model(x), compiled._orig_mod(x))


def test_a_block_that_breaks_is_refused_by_its_name() -> None:
    compiled = torchspan.partial_compile(nn.Sequential(Breaks(), Breaks()), fullgraph=True, backend=as_it_is, wait=True)
    with pytest.raises(CaptureError, match=r"^Breaks ×2 was compiled with fullgraph=True and breaks at"):
        compiled(torch.ones(1, 4))


def test_a_backend_that_fails_is_an_attempt_with_fullgraph_too() -> None:
    model, x = nn.Linear(4, 4), torch.ones(1, 4)
    compiled = torchspan.compile(model, fullgraph=True, backend=raises, wait=True)
    assert torch.equal(compiled(x), model(x))
    assert "lowering failed" in (compiled.report.attempts[0].cause or "")


def test_without_fullgraph_a_break_is_none_of_the_users_business() -> None:
    model, x = Breaks(), torch.ones(1, 4)
    compiled = torchspan.compile(model, backend=as_it_is, strategy="whole", wait=True)
    with torch.no_grad():  # torch 2.15 warns of its own look at .grad when it resumes after the break
        assert torch.equal(compiled(x), model(x))
    assert compiled.report.attempts[0].outcome == "compiled"
