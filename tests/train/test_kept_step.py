"""The whole step of two gloo ranks, compiled by rank 0 and kept: a small model, one compile, and starts that load it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.once]

RANKS = """
import json, os, sys
from dataclasses import replace
from pathlib import Path
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(sys.argv[2], os.environ["RANK"])
import torch
import torch.distributed as dist
from torchspan.capture._choose import capture_training
from torchspan.capture._state import BoundGraph
from torchspan.core.groups import list_groups
from torchspan.core.program import Program
from torchspan.core.report import Report
from torchspan.parallel.simple_fsdp import apply_simple_fsdp
from torchspan.passes._base import PassContext
from torchspan.passes._pipeline import Pipeline
from torchspan.jobs.budget import Budget
from torchspan.train._handing_over import HandingOver
from torchspan.train._kept_step import FILE, KeptStep
from torchspan.train.config import Parallelism
from torchspan.train.job import joined

class Loss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
    def forward(self, x):
        return self.linear(x).square().mean()

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
kept_in = Path(sys.argv[1]) / "kept"
answers = {}

with joined(Parallelism(), Report()) as job:
    def built():
        torch.manual_seed(0)
        return apply_simple_fsdp(Loss(), job.mesh)

    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank))
    eager = built()
    loss = eager(x)
    loss.backward()
    expected = [loss.detach(), *(parameter.grad.to_local() for parameter in eager.parameters())]

    def difference(graph):
        module = built()
        found = [BoundGraph(graph, module)(x), *(parameter.grad.to_local() for parameter in module.parameters())]
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))

    def told(report):
        decisions = [(d.choice, d.reason) for d in report.decisions if d.topic == "artifact"]
        return {"attempts": [(a.region, a.outcome, a.cause) for a in report.attempts], "decisions": decisions}

    def start(name, entries):
        report = Report()
        kept = KeptStep(kept_in, entries, job, report)
        graph = kept.load()
        answers[name] = told(report) | {"difference": None if graph is None else difference(graph)}
        return kept, report

    kept, report = start("none", {"model": "a"})
    graph = capture_training(Program(built(), (x,)))
    answers["groups"] = list_groups(graph.module)
    handing_over = HandingOver(job, Budget(seconds=400), report)
    pipeline = Pipeline.parse("inductor_decomposition,full_inductor_compilation")
    compiled = pipeline.run(graph, PassContext(report, handing_over.compile_region))
    handing_over.settle()
    kept.save(compiled)
    names = list_groups(handing_over.parts[0].module)
    answers["compiled"] = told(report) | {"difference": difference(compiled), "groups": names}
    start("same", {"model": "a"})
    start("other", {"model": "b"})
    dist.barrier()
    if rank == 0:
        path = kept_in / FILE
        path.write_bytes(path.read_bytes()[:-100] + bytes(100))
    start("damaged", {"model": "a"})

Path(sys.argv[1]).joinpath(f"{rank}.json").write_text(json.dumps(answers))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def answers(ask_two_ranks: Callable[[str], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return ask_two_ranks(RANKS)


def test_rank_0_compiles_the_step_with_its_collectives_and_the_other_loads_it(answers: list[dict[str, Any]]) -> None:
    first, other = (of_rank["compiled"] for of_rank in answers)
    assert first["attempts"] == [["step", "compiled", None]] and other["attempts"] == [["step", "loaded", None]]
    assert first["groups"] == other["groups"] == ["torchspan.dp_shard"]
    assert max(first["difference"], other["difference"]) < 1e-5


def test_the_next_start_loads_what_was_kept_and_captures_and_compiles_nothing(answers: list[dict[str, Any]]) -> None:
    for of_rank in answers:
        assert (
            of_rank["none"]["decisions"][0][0] == "captured and compiled anew" and "yet" in of_rank["none"]["decisions"][0][1]
        )
        assert [choice for choice, _ in of_rank["compiled"]["decisions"][1:]] == ["kept"]
        assert [choice for choice, _ in of_rank["same"]["decisions"]] == ["loaded"]
        assert [outcome for _, outcome, _ in of_rank["same"]["attempts"]] == ["loaded"]
        assert of_rank["same"]["difference"] < 1e-5


def test_a_step_of_another_job_is_not_loaded_and_the_entry_that_differs_is_named(answers: list[dict[str, Any]]) -> None:
    for of_rank in answers:
        ((choice, reason),) = of_rank["other"]["decisions"]
        assert choice == "captured and compiled anew" and "entry 'model': made for a, this is b" in reason


def test_a_damaged_file_is_told_and_not_loaded(answers: list[dict[str, Any]]) -> None:
    for of_rank in answers:
        ((choice, reason),) = of_rank["damaged"]["decisions"]
        assert choice == "captured and compiled anew" and "is damaged" in reason
