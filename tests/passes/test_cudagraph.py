"""CUDA graphs: without CUDA nothing is done, and it is said; what a recording holds is checked where there is a GPU."""

from __future__ import annotations

import pytest
import torch

from torchspan.capture._state import BoundGraph
from torchspan.capture.train_step import capture_train_step
from torchspan.core.errors import GuardError, InputError, PassError
from torchspan.core.graph import Graph
from torchspan.core.program import Program
from torchspan.core.report import Report
from torchspan.passes._base import PassContext
from torchspan.passes._pipeline import Pipeline
from torchspan.passes.cudagraph import Recording

PIPELINE = Pipeline.parse("cudagraph")


def test_on_a_cpu_the_graph_stays_as_it_is_and_the_report_says_so(graph: Graph) -> None:
    report = Report()
    after = PIPELINE.run(graph, PassContext(report))
    assert after.module is graph.module
    (decision,) = report.decisions
    assert decision.choice == "nothing changed" and "GPU" in decision.reason


def test_on_a_cpu_it_is_an_error_where_nothing_may_be_left_out(graph: Graph) -> None:
    with pytest.raises(PassError, match="cudagraph records kernels of a GPU"):
        PIPELINE.run(graph, PassContext(strict=True))


def test_it_stands_after_what_compiles() -> None:
    with pytest.raises(InputError, match="write full_inductor_compilation,cudagraph"):
        Pipeline.parse("cudagraph,full_inductor_compilation")
    Pipeline.parse("transformer_block_bucketing,regional_inductor,cudagraph")


def test_a_batch_is_copied_in_and_a_moved_parameter_is_refused() -> None:
    recording = Recording(lambda weight, batch: [weight * batch], [True, False], 0)
    weight, batch = torch.ones(3), torch.zeros(3)
    recording._inputs = [weight, torch.empty(3)]
    recording._refill((weight, batch + 5))
    assert torch.equal(recording._inputs[1], torch.full((3,), 5.0))
    with pytest.raises(GuardError, match="input 0 was moved"):
        recording._refill((weight.clone(), batch))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_replay_gives_the_bits_of_the_graph() -> None:
    module = torch.nn.Linear(4, 4).cuda()

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).square().sum()

    program = Program(Loss(), (torch.randn(2, 4, device="cuda"),))
    graph = capture_train_step(program)
    step, recorded = BoundGraph(graph, program.target), BoundGraph(PIPELINE.run(graph), program.target)  # type: ignore[arg-type]
    for _ in range(3):
        x = torch.randn(2, 4, device="cuda")
        loss, gradient = step(x), module.weight.grad.clone()  # type: ignore[union-attr]
        assert torch.equal(recorded(x), loss) and torch.equal(module.weight.grad, gradient)  # type: ignore[arg-type]
