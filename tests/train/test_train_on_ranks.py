"""Training on four real gloo ranks: one launch, many questions, because a launch is slow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from torchspan.capture.joint import is_supported

RANKS = """
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
import torch.distributed as dist
from torchspan.core.errors import CaptureError, InputError
from torchspan.capture.joint import is_supported
from torchspan.train.config import Compile, Parallelism, TrainConfig, Training
from torchspan.train.loop import train
from torchspan.train.job import build_program, check_same_collectives, degrees_of, joined
from torchspan.core.report import Report

dist.init_process_group("gloo")
training = Training(steps=5, global_batch_size=4, seq_len=16, threads=1)
base = TrainConfig(config="tiny", training=training)
answers = {}

def run(name, parallelism, compile):
    result = train(replace(base, parallelism=parallelism, compile=compile))
    answers[name] = {
        "losses": [loss.hex() for loss in result.losses],
        "decisions": [(d.topic, d.subject, d.choice) for d in result.report.decisions],
        "attempts": [(a.region, a.outcome) for a in result.report.attempts],
    }

two_by_two = Parallelism(data_parallel_shard_degree=2, tensor_parallel_degree=2)
fsdp = Parallelism(data_parallel_shard_degree=4)
bucketing = "transformer_block_bucketing"
run("eager", two_by_two, Compile(enable=False))
run("train_step", two_by_two, Compile(capture="train_step"))
run("train_step bucketed", two_by_two, Compile(capture="train_step", passes=bucketing))
if is_supported():
    run("joint", two_by_two, Compile(capture="joint"))
    run("joint bucketed", two_by_two, Compile(capture="joint", passes=bucketing))
run("fsdp eager", fsdp, Compile(enable=False))
run("fsdp bucketed", fsdp, Compile(passes=bucketing))
run("bfloat16 eager", replace(fsdp, param_dtype="bfloat16"), Compile(enable=False))
run("bfloat16 bucketed", replace(fsdp, param_dtype="bfloat16"), Compile(capture="train_step", passes=bucketing))

def message(function):
    try:
        function()
    except (CaptureError, InputError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"

answers["wrong product"] = message(lambda: degrees_of(Parallelism(3, 2), 4))
answers["odd batch"] = message(
    lambda: train(replace(base, training=replace(training, global_batch_size=3), parallelism=fsdp))
)
answers["heads"] = message(lambda: train(replace(base, parallelism=Parallelism(tensor_parallel_degree=4))))
answers["seq_len"] = message(
    lambda: train(replace(base, training=replace(training, seq_len=15), parallelism=two_by_two))
)

class Uneven:  # a graph that calls a collective on rank 0 only
    def __init__(self, rank):
        graph = torch.fx.Graph()
        x = graph.placeholder("x")
        if rank == 0:
            x = graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (x,))
        graph.output(x)
        self.module = torch.fx.GraphModule(torch.nn.Module(), graph)

with joined(fsdp, Report()) as job:
    answers["uneven"] = message(lambda: check_same_collectives(Uneven(job.rank), job))

gathered = [None] * 4
dist.all_gather_object(gathered, {name: a["losses"] for name, a in answers.items() if isinstance(a, dict)})
answers["ranks agree"] = all(other == gathered[0] for other in gathered)
if dist.get_rank() == 0:
    Path(sys.argv[1]).write_text(json.dumps(answers))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, launch: Any) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    script, out = folder / "ranks.py", folder / "answers.json"
    script.write_text(RANKS)
    launch(4, str(script), str(out))
    found: dict[str, Any] = json.loads(Path(out).read_text())
    return found


def test_every_rank_sees_the_same_losses_and_they_fall(answers: dict[str, Any]) -> None:
    assert answers["ranks agree"]
    losses = [float.fromhex(loss) for loss in answers["eager"]["losses"]]
    assert losses[0] == pytest.approx(5.55, abs=0.1) and losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("capture", ["train_step", "joint"])
def test_a_captured_graph_gives_the_losses_of_eager_bitwise(answers: dict[str, Any], capture: str) -> None:
    if capture == "joint" and not is_supported():
        assert "joint" not in answers
        return
    assert answers[capture]["losses"] == answers["eager"]["losses"]
    assert answers[f"{capture} bucketed"]["losses"] == answers["eager"]["losses"]


def test_bucketing_is_bitwise_with_four_fsdp_ranks_too_and_in_mixed_precision(answers: dict[str, Any]) -> None:
    assert answers["fsdp bucketed"]["losses"] == answers["fsdp eager"]["losses"]
    assert answers["bfloat16 bucketed"]["losses"] == answers["bfloat16 eager"]["losses"]
    assert answers["bfloat16 eager"]["losses"] != answers["fsdp eager"]["losses"]


def test_bucketing_leaves_fewer_collectives(answers: dict[str, Any]) -> None:
    choices = {subject: choice for _, subject, choice in answers["fsdp bucketed"]["decisions"]}
    # two blocks of nine parameters, and three parameters outside of them
    assert choices["transformer_block_bucketing"] == "all_gather_into_tensor 21 → 5, reduce_scatter_tensor 21 → 5"


def test_the_sharded_losses_are_those_of_one_process_but_for_rounding(answers: dict[str, Any]) -> None:
    from torchspan.train.config import TrainConfig, Training
    from torchspan.train.loop import train

    alone = train(TrainConfig(config="tiny", training=Training(steps=5, global_batch_size=4, seq_len=16)))
    for name in ("eager", "fsdp eager"):
        assert [float.fromhex(loss) for loss in answers[name]["losses"]] == pytest.approx(alone.losses, abs=2e-4), name


def test_impossible_degrees_are_clear_errors(answers: dict[str, Any]) -> None:
    assert answers["wrong product"] == (
        "InputError: dp_shard 3 × tp 2 are 6 processes, this job has 4; set the degrees so that their product is 4"
    )
    assert answers["odd batch"].startswith("InputError: --training.global_batch_size is 3, which 4 data-parallel ranks do not")
    assert answers["heads"] == "InputError: num_kv_heads is 2, which tp 4 does not divide; expected a multiple of 4"
    assert answers["seq_len"] == "InputError: --training.seq_len is 15, which tp 2 does not divide; expected a multiple of 2"


def test_ranks_that_would_wait_for_each_other_are_told_apart_before_they_do(answers: dict[str, Any]) -> None:
    assert answers["uneven"].startswith(
        "CaptureError: the graphs of ranks [1, 2, 3] call other collectives than that of rank 0"
    )
