"""What rank 0 compiles and hands over, on two real gloo ranks that share no cache folder: one launch, many questions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.once

RANKS = """
import json, os, sys
from pathlib import Path
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(sys.argv[2], os.environ["RANK"])
import torch
import torch.distributed as dist
from torch.fx.experimental.proxy_tensor import make_fx
from torchspan.core.report import Report
from torchspan.jobs.budget import Budget
from torchspan.jobs.supervisor import server_pids
from torchspan.train._handing_over import HandingOver
from torchspan.train.config import Compile, Parallelism, TrainConfig, Training
from torchspan.train.job import joined
from torchspan.train.loop import train

dist.init_process_group("gloo")
training = Training(steps=1, global_batch_size=2, seq_len=8, threads=1)
answers = {}

def told(report):
    return {
        "attempts": [(a.region, a.outcome, a.cause) for a in report.attempts],
        "decisions": [(d.subject, d.choice) for d in report.decisions if d.topic == "compile"],
        "has_server": bool(server_pids()),
    }

def run(name, compile):
    result = train(TrainConfig(config="tiny", training=training, compile=compile))
    answers[name] = {"losses": result.losses, **told(result.report)}

def settle(name, function, x, seconds):
    report = Report()
    with joined(Parallelism(), Report()) as job:
        handing_over = HandingOver(job, Budget(seconds=seconds), report)
        call = handing_over.compile_region(make_fx(function)(x), [x], name)
        handing_over.settle()
    answers[name] = {"is_right": torch.allclose(call(x)[0], function(x)[0], atol=1e-6), **told(report)}

torch.set_num_threads(1)
settle("equal graphs", lambda x: (x.sin() * 2, (x + 1).sum()), torch.ones(64), 240)
run("eager", Compile(enable=False))
run("too slow", Compile(capture="train_step", passes="regional_inductor{modules=*.0.attention}", budget_seconds=0.01))
settle("other graphs", (lambda x: (x.sin(),)) if dist.get_rank() == 0 else (lambda x: (x.cos(),)), torch.ones(3), 0.01)
settle("other sizes", lambda x: (x.tan(),), torch.ones(3 + dist.get_rank()), 0.01)

Path(sys.argv[1]).joinpath(f"{dist.get_rank()}.json").write_text(json.dumps(answers))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def answers(ask_two_ranks: Callable[[str], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return ask_two_ranks(RANKS)


def test_rank_0_compiles_and_the_other_rank_loads_and_compiles_nothing(answers: list[dict[str, Any]]) -> None:
    first, other = (of_rank["equal graphs"] for of_rank in answers)
    assert first["attempts"] == [["equal graphs", "compiled", None]]
    assert other["attempts"] == [["equal graphs", "loaded", None]]
    assert first["has_server"] and not other["has_server"], "what compiles is a child of the compile server"
    assert first["is_right"] and other["is_right"]
    assert ["ranks", "rank 0 hands over 1 regions"] in other["decisions"]


def test_what_rank_0_cannot_compile_runs_as_it_is_on_every_rank(answers: list[dict[str, Any]]) -> None:
    first, other = (of_rank["too slow"] for of_rank in answers)
    assert {outcome for _, outcome, _ in first["attempts"]} == {"timeout"}
    assert other["attempts"] == first["attempts"] and not other["has_server"]
    assert first["losses"] == other["losses"] == answers[1]["eager"]["losses"]


@pytest.mark.parametrize("name", ["other graphs", "other sizes"])
def test_a_rank_whose_graph_is_another_compiles_it_itself_and_says_so(answers: list[dict[str, Any]], name: str) -> None:
    first, other = (of_rank[name] for of_rank in answers)
    assert first["is_right"] and other["is_right"]
    assert [name, "compiled by this rank"] in other["decisions"] and [name, "compiled by this rank"] not in first["decisions"]
    assert [outcome for _, outcome, _ in other["attempts"]] == ["timeout"]
