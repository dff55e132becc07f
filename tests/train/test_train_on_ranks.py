"""Training on four real gloo ranks: one launch, many questions, because a launch is slow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from torchspan.capture.joint import is_supported

RANKS = """
import copy, json, sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
import torch
import torch.distributed as dist
from torchspan.core.errors import CaptureError, InputError
from torchspan.capture.joint import is_supported
from torchspan.train.config import Compile, Parallelism, TrainConfig, Training
from torchspan.train.loop import train
from torchspan.train.job import Job, build_program, check_same_collectives, degrees_of, joined
from torchspan.train.data import ByteTokens, part_of
from torchspan.parallel.clip import clip_grad_norm_
from torchspan.parallel.simple_fsdp import apply_simple_fsdp
from torchspan.parallel.tensor_parallel import apply_tensor_parallel
from torchspan.core.report import Report
from torchspan.models._base import get_model
from torchspan.parallel.optimizer_state import load_optimizer_state, optimizer_state

dist.init_process_group("gloo")
training = Training(steps=5, global_batch_size=4, seq_len=16, threads=1)
base = TrainConfig(config="tiny", training=training)
answers = {}

def run(name, parallelism, compile, **changed):
    result = train(replace(base, parallelism=parallelism, compile=compile, training=replace(training, **changed)))
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
run("accumulated eager", fsdp, Compile(enable=False), gradient_accumulation_steps=2, global_batch_size=8)
run("accumulated", fsdp, Compile(), gradient_accumulation_steps=2, global_batch_size=8)
run("at once", fsdp, Compile(), global_batch_size=8)
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

def state_travels():
    # weights and optimizer states of one process, on these ranks and back
    alone = build_program(get_model("llama3"), base, Job(), annotate=False)
    batch = ByteTokens.load(None).batch(0, 0, 4, 16)
    optimizer = torch.optim.AdamW(alone.parameters())
    alone(*batch).backward()
    optimizer.step()
    found = []
    for layout in (two_by_two, fsdp, replace(fsdp, data_parallel_shard_degree=2, data_parallel_replicate_degree=2)):
        with joined(layout, Report()) as job:
            other = replace(base, training=replace(training, seed=5))
            program = build_program(get_model("llama3"), other, job, annotate=False)
            sharded = torch.optim.AdamW(program.parameters())
            program.load_state_dict(alone.state_dict())
            load_optimizer_state(program, sharded, optimizer_state(alone, optimizer))
            back = {name: value.full_tensor() for name, value in program.state_dict().items() if hasattr(value, "full_tensor")}
            found.append(all(torch.equal(back[name], value) for name, value in alone.named_parameters()))
            states = optimizer_state(program, sharded)
            ours = optimizer_state(alone, optimizer)
            found.append(all(torch.equal(states[n]["exp_avg"].full_tensor(), ours[n]["exp_avg"]) for n in ours))
            again = build_program(get_model("llama3"), other, job, annotate=False)
            again.load_state_dict(program.state_dict())  # of DTensors
            rest = {name: value.full_tensor() for name, value in again.state_dict().items() if hasattr(value, "full_tensor")}
            found.append(all(torch.equal(rest[name], value) for name, value in alone.named_parameters()))
    return found


def clipped():
    # norms of the gradients of a mixture of experts, before and after clipping
    found = {}
    config = replace(base, module="deepseek_v3")
    tokens = ByteTokens.load(None).batch(0, 0, 4, 16)
    for name, layout in {"alone": None, "experts": replace(two_by_two, expert_parallel_degree=2)}.items():
        with joined(layout, Report()) if layout else nullcontext(Job()) as job:
            program = build_program(get_model("deepseek_v3"), config, job, annotate=False)
            program(*(part_of(part, job.data_parallel_rank, job.num_data_parallel) for part in tokens)).backward()
            found[name] = [float(clip_grad_norm_(program.parameters(), 0.1)), float(clip_grad_norm_(program.parameters(), 1.0))]
    return found


def uneven():
    with joined(two_by_two, Report()) as job:
        torch.manual_seed(0)
        whole = torch.nn.Sequential(torch.nn.Linear(3, 10))
        layer = copy.deepcopy(whole)
        apply_tensor_parallel(layer, job.mesh["tp"], {"0": "column"})
        apply_simple_fsdp(layer, job.mesh)
        kept = layer.state_dict()
        layer.load_state_dict(kept)
        return all(torch.equal(layer.state_dict()[n].full_tensor(), value) and torch.equal(kept[n].full_tensor(), value)
                   for n, value in whole.state_dict().items())


answers["clipped"], answers["uneven shards"] = clipped(), uneven()
answers["state"] = state_travels()


class Uneven:  # a graph that calls a collective on rank 0 only
    def __init__(self, rank):
        graph = torch.fx.Graph()
        x = graph.placeholder("x")
        if rank == 0:
            x = graph.call_function(torch.ops._c10d_functional.all_reduce.default, (x, "sum", "0"))
        graph.output(x)
        self.module = torch.fx.GraphModule(torch.nn.Module(), graph)

with joined(fsdp, Report()) as job:
    answers["uneven"] = message(lambda: check_same_collectives(Uneven(job.rank), job))

gathered = [None] * 4
dist.all_gather_object(gathered, {name: a["losses"] for name, a in answers.items() if isinstance(a, dict) and "losses" in a})
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
    answer: dict[str, Any] = json.loads(Path(out).read_text())
    return answer


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


def test_gradients_of_micro_batches_are_added_up_as_eager_adds_them(answers: dict[str, Any]) -> None:
    assert answers["accumulated"]["losses"] == answers["accumulated eager"]["losses"]
    at_once = [float.fromhex(loss) for loss in answers["at once"]["losses"]]
    assert [float.fromhex(loss) for loss in answers["accumulated"]["losses"]] == pytest.approx(at_once, abs=2e-4)


def test_weights_and_optimizer_states_travel_between_one_process_and_any_layout(answers: dict[str, Any]) -> None:
    assert answers["state"] == [True] * 9


def test_gradients_are_clipped_by_their_norm_over_all_meshes(answers: dict[str, Any]) -> None:
    alone, experts = answers["clipped"]["alone"], answers["clipped"]["experts"]
    assert experts == pytest.approx(alone, rel=1e-5)
    assert alone[0] > 0.2 and alone[1] == pytest.approx(0.1, rel=1e-4)


def test_rows_that_no_axis_divides_are_whole_in_a_state_dict(answers: dict[str, Any]) -> None:
    assert answers["uneven shards"] is True


def test_ranks_that_would_wait_for_each_other_are_told_apart_before_they_do(answers: dict[str, Any]) -> None:
    assert answers["uneven"].startswith(
        "CaptureError: the graphs of ranks [1, 2, 3] call other collectives than that of rank 0"
    )
