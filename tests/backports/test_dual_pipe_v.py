"""ScheduleDualPipeV: the loss and every gradient of a pipelined model equal the unpipelined one's, on real gloo ranks.

As a program (``python test_dual_pipe_v.py FILE``), this is what the ranks run: one launch answers all questions to ranks.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import importlib
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.environment.scope import Environment

BACKPORT = REGISTRY.get("dual_pipe_v").BACKPORT
TOLERANCE = 1e-12  # float64: sums in another order

WIDTH, VOCABULARY, LENGTH = 8, 11, 5


class Block(torch.nn.Module):
    """Attention and a gated MLP, each with a norm before it and a skip around it; a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = torch.nn.RMSNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH, bias=False), torch.nn.Linear(WIDTH, WIDTH)
        self.gate, self.up = torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.down, self.twice = torch.nn.Linear(2 * WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.attention_norm(x_BLD)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x_BLD = x_BLD + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        normed_BLD = self.twice(self.twice(self.mlp_norm(x_BLD)).tanh())
        return x_BLD + self.down(silu(self.gate(normed_BLD)) * self.up(normed_BLD))


def whole_model(num_stages: int) -> list[torch.nn.Module]:
    """The stages of a small language model, the same on every rank."""
    torch.manual_seed(0)
    stages: list[torch.nn.Module] = [torch.nn.Sequential(Block()) for _ in range(num_stages)]
    stages[0] = torch.nn.Sequential(torch.nn.Embedding(VOCABULARY, WIDTH), Block())
    stages[-1] = torch.nn.Sequential(Block(), torch.nn.RMSNorm(WIDTH), torch.nn.Linear(WIDTH, VOCABULARY))
    return [stage.double() for stage in stages]


def batch(num_microbatches: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(VOCABULARY, (2 * num_microbatches, LENGTH + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def loss_of(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.flatten(0, 1), target.flatten())


class Pipeline:
    """This rank's part of a pipelined model, and the whole model to compare with."""

    def __init__(
        self,
        num_microbatches: int,
        schedule: Any = None,
        group: Any = None,
        prepare: Callable[..., Any] = lambda module: module,
        **options: Any,
    ) -> None:
        from torch.distributed.pipelining import PipelineStage, ScheduleDualPipeV

        self.num_microbatches = num_microbatches
        rank, self.num_stages = dist.get_rank(group), 2 * dist.get_world_size(group)
        self.is_first = rank == 0  # in a V, this rank has the last stage too
        self.reference = whole_model(self.num_stages)
        self.indices = [rank, self.num_stages - 1 - rank]
        modules = [prepare(copy.deepcopy(self.reference[index])) for index in self.indices]
        device = torch.device("cpu")
        self.stages = [
            PipelineStage(module, index, self.num_stages, device, group=group)
            for module, index in zip(modules, self.indices, strict=True)
        ]
        self.schedule = (schedule or ScheduleDualPipeV)(self.stages, num_microbatches, loss_fn=loss_of, **options)

    def run(self, method: str = "step", **options: Any) -> tuple[Any, list[torch.Tensor]]:
        """The output and the losses; as torchtitan does, only ranks that need them are given tokens, targets and a list."""
        tokens, target = batch(self.num_microbatches)
        losses: list[torch.Tensor] = []
        arguments: dict[str, Any] = {"target": target, "losses": losses} if self.is_first else {}
        output = getattr(self.schedule, method)(*([tokens] if self.is_first else []), **arguments, **options)
        return output, losses

    def expected_losses(self) -> list[torch.Tensor]:
        tokens, target = batch(self.num_microbatches)
        pairs = zip(tokens.chunk(self.num_microbatches), target.chunk(self.num_microbatches), strict=True)
        model = torch.nn.Sequential(*self.reference)
        return [loss_of(model(x), y) for x, y in pairs]

    def difference(self, losses: list[torch.Tensor], factor: float = 1.0) -> float:
        """The largest difference of a loss, and of a gradient over `factor`, from what the whole model gives."""
        expected = self.expected_losses()
        torch.nn.Sequential(*self.reference).zero_grad()
        torch.stack(expected).mean().backward()
        pairs = list(zip(losses, expected, strict=True)) if self.is_first else []
        for stage, index in zip(self.stages, self.indices, strict=True):
            for parameter, reference in zip(stage.submod.parameters(), self.reference[index].parameters(), strict=True):
                grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
                pairs.append((grad / factor, reference.grad))
        return max((mine - theirs).abs().max().item() for mine, theirs in pairs)


# what ranks are asked; each gives a value that JSON can hold


def gradients() -> dict[int, float]:
    """The difference from the whole model, for several numbers of microbatches."""
    num_stages = 2 * dist.get_world_size()
    results = {}
    for num_microbatches in (num_stages, num_stages + 1, 2 * num_stages + 3):
        pipeline = Pipeline(num_microbatches)
        results[num_microbatches] = pipeline.difference(pipeline.run()[1])
    return results


def two_steps_unscaled() -> float:
    """Gradients add up over steps, and are not divided by the number of microbatches if the loss is."""
    pipeline = Pipeline(2 * dist.get_world_size(), scale_grads=False)
    pipeline.run()
    return pipeline.difference(pipeline.run()[1], factor=2.0 * pipeline.num_microbatches)


def output() -> dict[str, Any]:
    """The output of the last stage, where it is, unless it is not wanted."""
    pipeline = Pipeline(2 * dist.get_world_size() + 1)
    whole, _ = pipeline.run()
    none, losses = pipeline.run(return_outputs=False)
    expected = torch.nn.Sequential(*pipeline.reference)(batch(pipeline.num_microbatches)[0])
    return {
        "is where the last stage is": (whole is not None) == pipeline.is_first,
        "is the whole model's": whole is None or torch.allclose(whole, expected),
        "is left out": none is None and len(losses) == (pipeline.num_microbatches if pipeline.is_first else 0),
    }


def pairs_of_the_users() -> dict[str, Any]:
    """A function that runs the two parts of a pair in two threads, with what torchtitan's overlap_callback uses."""
    from torch.distributed.pipelining.schedules import OVERLAP_F_B

    pipeline = Pipeline(2 * dist.get_world_size() + 2)
    pairs: list[Any] = []
    pipeline.schedule.register_custom_function(OVERLAP_F_B, lambda action, ctx: (pairs.append(action), run_pair(action, ctx)))
    difference = pipeline.difference(pipeline.run()[1])
    planned = [action for action in pipeline.schedule.pipeline_order[pipeline.schedule.rank] if action.sub_actions]
    return {"difference": difference, "all were given to it": pairs == planned and len(pairs) > 0}


def run_pair(action: Any, ctx: Any) -> None:
    from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime, _wait_batch_p2p

    schedule = ctx.schedule_ref
    assert isinstance(schedule, _PipelineScheduleRuntime)
    stages = {stage.stage_index: stage for stage in schedule._stages}
    forward, backward = action.sub_actions
    ahead, back = stages[forward.stage_index], stages[backward.stage_index]
    if not ahead.is_first and ahead.stage_index - 1 not in stages:
        _wait_batch_p2p(schedule.fwd_recv_ops.pop((forward.stage_index, forward.microbatch_index)))
    if not back.is_last and back.stage_index + 1 not in stages:
        _wait_batch_p2p(schedule.bwd_recv_ops.pop((backward.stage_index, backward.microbatch_index)))

    def run_backward() -> None:
        schedule._assert_unsharded(back)
        index, microbatch = backward.stage_index, backward.microbatch_index
        loss = schedule._maybe_get_loss(back, microbatch)
        schedule.backward_counter[index] += 1
        last = schedule.backward_counter[index] == schedule._n_microbatches
        back.backward_one_chunk(microbatch, loss=loss, full_backward=True, last_backward=last)
        if index - 1 in stages:
            stages[index - 1].set_local_bwd_input(back.get_local_bwd_output(microbatch), microbatch)

    thread = threading.Thread(target=run_backward)
    thread.start()
    schedule._assert_unsharded(ahead)
    microbatch = forward.microbatch_index
    result = ahead.forward_one_chunk(microbatch, ctx.arg_mbs[microbatch], ctx.kwarg_mbs[microbatch])
    schedule._maybe_compute_loss(ahead, result, ctx.target_mbs, microbatch)
    if forward.stage_index + 1 in stages:
        stages[forward.stage_index + 1].set_local_fwd_input(result, microbatch)
    thread.join()


def other_actions_of_the_users() -> dict[str, Any]:
    """Functions for single actions are called in place of the runtime's work; what they leave out is not done."""
    from torch.distributed.pipelining.schedules import RESHARD, UNSHARD

    pipeline = Pipeline(2 * dist.get_world_size())
    actions: list[str] = []
    for kind in (UNSHARD, RESHARD):
        pipeline.schedule.register_custom_function(kind, lambda action, ctx: actions.append(str(action)))
    difference = pipeline.difference(pipeline.run()[1])
    return {"difference": difference, "were called": set(actions) >= {f"{index}UNSHARD" for index in pipeline.indices}}


def schedules_from_files() -> dict[str, Any]:
    """A schedule that is written to a file, with pairs in it, is read and run."""
    from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

    results = {}
    first = Pipeline(2 * dist.get_world_size())
    for form, order in {
        "compute_only": first.schedule.pipeline_order,
        "compute_comms": first.schedule.pipeline_order_with_comms,
    }.items():
        file = Path(tempfile.mkstemp(suffix=".csv")[1])
        with file.open("w", newline="") as opened:
            csv.writer(opened).writerows(order.values())
        again = Pipeline(first.num_microbatches, schedule=_PipelineScheduleRuntime)
        again.schedule._load_csv(str(file), format=form)
        results[form] = again.difference(again.run()[1])
        copied = file.with_suffix(".copy")
        again.schedule._dump_csv(str(copied))
        results[f"{form}, written again"] = len(copied.read_text().splitlines()) == dist.get_world_size()
        file.unlink()
        copied.unlink()
    return results


def evaluation() -> dict[str, Any]:
    """Forward only, before and after a training step; torch's own fails in a V."""
    pipeline = Pipeline(2 * dist.get_world_size())
    pipeline.schedule.register_custom_function(overlap(), run_pair)
    results: dict[str, Any] = {}
    for turn in ("before", "after"):
        with torch.no_grad():
            result, losses = pipeline.run("eval")
        results[f"output {turn}"] = (result is not None) == pipeline.is_first
        if pipeline.is_first:
            results[f"loss {turn}"] = (torch.stack(losses) - torch.stack(pipeline.expected_losses())).abs().max().item()
        if turn == "before":
            results["no gradients"] = all(p.grad is None for stage in pipeline.stages for p in stage.submod.parameters())
            results["difference"] = pipeline.difference(pipeline.run()[1])
    return results


def overlap() -> Any:
    from torch.distributed.pipelining.schedules import OVERLAP_F_B

    return OVERLAP_F_B


def without_gradients() -> str:
    pipeline = Pipeline(2 * dist.get_world_size())
    with pytest.raises(RuntimeError) as raised, torch.no_grad():
        pipeline.run()
    return str(raised.value)


def sharded_by_fsdp() -> float:
    """Pipeline parallel over two ranks, each of them two ranks among which FSDP shards every block; two steps."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))

    def shard(module: torch.nn.Sequential) -> Any:
        for part in module:
            if isinstance(part, Block):
                fully_shard(part, mesh=mesh["dp"], reshard_after_forward=False)
        return fully_shard(module, mesh=mesh["dp"], reshard_after_forward=False)

    pipeline = Pipeline(5, group=mesh.get_group("pp"), prepare=shard, scale_grads=False)
    pipeline.run()
    return pipeline.difference(pipeline.run()[1], factor=2.0 * pipeline.num_microbatches)


def after_undo() -> float:
    """A schedule that was made keeps working; the last question, for it ends the environment."""
    pipeline = Pipeline(3)
    environments[0].deactivate()
    return pipeline.difference(pipeline.run()[1])


QUESTIONS: dict[int, list[Callable[[], Any]]] = {
    1: [gradients, evaluation, without_gradients, output, after_undo],
    2: [
        gradients,
        evaluation,
        two_steps_unscaled,
        output,
        pairs_of_the_users,
        other_actions_of_the_users,
        schedules_from_files,
    ],
    4: [gradients, pairs_of_the_users, sharded_by_fsdp],
}
environments: list[Environment] = []


def rank_program(rank: int, num_ranks: int, rendezvous: str, answers: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=num_ranks)
    questions = [question for question in QUESTIONS[num_ranks] if question is not evaluation or is_lacking(BACKPORT)]
    try:
        answers.put({question.__name__: question() for question in questions})
    except BaseException:
        answers.put(f"rank {rank} of {num_ranks}: {traceback.format_exc()}")
        raise
    dist.destroy_process_group()


def ask(num_ranks: int) -> list[dict[str, Any]]:
    """The answers of this many ranks; they are forks, so that torch is imported once."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    results: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(num_ranks):
            context.Process(target=rank_program, args=(rank, num_ranks, f"{folder}/rendezvous", answers), daemon=True).start()
        while len(results) < num_ranks:
            results.append(answers.get(timeout=200))
            if isinstance(results[-1], str):
                sys.exit(results[-1])
    return results


def main(file: str) -> None:
    torch.set_num_threads(1)
    with Environment(BACKPORT.patches()) as environment:
        environments.append(environment)
        for module in ("torch.distributed.pipelining.schedules", "torch.distributed.fsdp"):
            importlib.import_module(module)
        Path(file).write_text(json.dumps({num_ranks: ask(num_ranks) for num_ranks in QUESTIONS}))


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("ranks") / "answers.json"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TORCHSPAN")} | {"OMP_NUM_THREADS": "1"}
    argv = [sys.executable, __file__, str(file)]
    process = subprocess.run(argv, capture_output=True, text=True, timeout=400, env=environ, check=False)
    if not is_lacking(BACKPORT) and "Pair is not connected" in process.stderr:  # torch 2.10
        pytest.skip("torch's own schedules of this release send to their own rank first in a V, which gloo cannot")
    assert process.returncode == 0, f"exit {process.returncode}\n{process.stdout[-3000:]}\n{process.stderr[-6000:]}"
    return json.loads(file.read_text())


@pytest.mark.parametrize(
    ("num_ranks", "question"), [(count, question.__name__) for count, questions in QUESTIONS.items() for question in questions]
)
def test_on_ranks(answers: Any, num_ranks: int, question: str) -> None:
    if question == "evaluation" and not is_lacking(BACKPORT):
        pytest.skip("torch's own eval() fails where two stages that follow each other are on one rank")
    assert len(answers[str(num_ranks)]) == num_ranks
    for answer in answers[str(num_ranks)]:
        result = answer[question]
        for what, value in result.items() if isinstance(result, dict) else [(question, result)]:
            if isinstance(value, str):
                assert "requires gradients to be enabled" in value and "eval()" in value
            else:
                assert value is True or (isinstance(value, float) and value < TOLERANCE), (what, value)


# what needs no ranks: a process group that sends nothing


@pytest.fixture
def stage(environment: Environment) -> Iterator[Callable[..., Any]]:
    """Makes stages of the first of two ranks."""
    from torch.distributed.pipelining import PipelineStage
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield lambda index, module=None: PipelineStage(module or torch.nn.Linear(2, 2), index, 4, torch.device("cpu"))
    dist.destroy_process_group()


def test_it_is_found_in_every_place_where_torch_has_it(environment: Environment) -> None:
    pipelining = importlib.import_module("torch.distributed.pipelining")
    schedules = pipelining.schedules
    result = schedules.get_schedule_class("dualpipeV")
    assert result is schedules.ScheduleDualPipeV is pipelining.ScheduleDualPipeV
    assert "ScheduleDualPipeV" in pipelining.__all__ and "ScheduleDualPipeV" in schedules.__all__
    assert issubclass(result, schedules._PipelineScheduleRuntime) and issubclass(result, schedules.PipelineScheduleMulti)
    assert (result.__module__, result.__qualname__) == (schedules.__name__, "ScheduleDualPipeV")
    assert schedules.get_schedule_class("1F1B") is schedules.Schedule1F1B
    with pytest.raises(ValueError, match=r"Unknown schedule name 'DualPipe'.*GPipe.*'DualPipeV'\]$"):
        schedules.get_schedule_class("DualPipe")
    assert pipelining._utils.generate_rank_to_stage_mapping(2, 4, style="v") == {0: [0, 3], 1: [1, 2]}


def test_the_computation_type_is_one_of_torchs(environment: Environment) -> None:
    from torch.distributed.pipelining.schedules import FORWARD, OVERLAP_F_B, _ComputationType

    assert OVERLAP_F_B is _ComputationType.OVERLAP_F_B is _ComputationType["OVERLAP_F_B"] is _ComputationType(OVERLAP_F_B.value)
    assert isinstance(OVERLAP_F_B, _ComputationType) and OVERLAP_F_B in list(_ComputationType) and OVERLAP_F_B != FORWARD
    assert OVERLAP_F_B.name == "OVERLAP_F_B" and len(_ComputationType) == len(set(_ComputationType))
    assert _ComputationType.from_str("OVERLAP_F_B") is OVERLAP_F_B and _ComputationType.from_str("F") is FORWARD
    assert pickle.loads(pickle.dumps(OVERLAP_F_B)) is OVERLAP_F_B is copy.deepcopy(OVERLAP_F_B)
    with pytest.raises(RuntimeError, match="Invalid computation type X"):
        _ComputationType.from_str("X")


def test_an_action_has_parts_and_is_written_and_read(environment: Environment) -> None:
    from torch.distributed.pipelining.schedules import FORWARD, FULL_BACKWARD, OVERLAP_F_B, _Action

    parts = (_Action(0, FORWARD, 3), _Action(3, FULL_BACKWARD, 1))
    pair = _Action(-1, OVERLAP_F_B, None, parts)
    assert pair.sub_actions == parts and parts[0].sub_actions is None and pair.is_compute_op
    assert repr(pair) == str(pair) == "(0F3;3B1)OVERLAP_F_B" and repr(parts[0]) == "0F3"
    assert (
        _Action.from_str(" (0F3;3B1)OVERLAP_F_B") == pair
        and _Action.from_str("0F3") == parts[0]
        and _Action.from_str("") is None
    )
    assert isinstance(_Action.from_str("1SEND_F2"), _Action) and not _Action.from_str("1SEND_F2").is_compute_op
    other = _Action(-1, OVERLAP_F_B, None, parts[::-1])
    assert pair != other and len({pair, other, _Action(-1, OVERLAP_F_B, None, parts), *parts, _Action(0, FORWARD, 3)}) == 4
    for copied in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert copied == pair and copied.sub_actions == parts and isinstance(copied, _Action)
    with pytest.raises(RuntimeError, match="Invalid action string: nonsense"):
        _Action.from_str("nonsense")


def test_the_order_is_torchs(environment: Environment) -> None:
    """The digest is of torch 2.13.0's and 2.15.0's orders."""
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

    assert str(get_schedule_ops("DualPipeV", 2, 4)[1]) == (
        "[1F0, 2F0, 1F1, 2F1, 1F2, 2B0, (2F2;1B0)OVERLAP_F_B, (1F3;2B1)OVERLAP_F_B, (2F3;1B1)OVERLAP_F_B, 2B2, 1B2, "
        "2I3, 1I3, 2W3, 1W3]"
    )
    digest = hashlib.sha256()
    for num_ranks in (1, 2, 3, 4, 5, 8):
        for num_microbatches in range(2 * num_ranks, 4 * num_ranks + 3):
            for rank, actions in enumerate(get_schedule_ops("DualPipeV", num_ranks, num_microbatches)):
                digest.update(f"{num_ranks} {num_microbatches} {rank} {actions}\n".encode())
    assert digest.hexdigest() == "6de383c32c1258c5a043e0b2b969ac1de789a2b7bc7e076cd2e2bea5ff246c9c"


@pytest.mark.parametrize("name", ["InterleavedZeroBubble", "Interleaved1F1B", "LoopedBFS", "ZBVZeroBubble"])
def test_other_schedules_are_as_they_were(environment: Environment, name: str) -> None:
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

    during = str(get_schedule_ops(name, 4, 8, 2))
    environment.deactivate()
    assert str(get_schedule_ops(name, 4, 8, 2)) == during


def test_what_is_no_v_is_refused(stage: Callable[..., Any]) -> None:
    from torch.distributed.pipelining import ScheduleDualPipeV

    with pytest.raises(ValueError, match="requires exactly 2 stages per rank, but got 1"):
        ScheduleDualPipeV([stage(0)], 8)
    with pytest.raises(ValueError, match="at least as many microbatches as stages, but got 3 microbatches and 4 stages"):
        ScheduleDualPipeV([stage(0), stage(3)], 3)
    with pytest.raises(TypeError):
        ScheduleDualPipeV([stage(0), stage(3)], 4, no_such_option=1)
    compiled = torch.nn.Sequential(torch.compile(torch.nn.Linear(2, 2)))
    with pytest.raises(RuntimeError, match=r"ScheduleDualPipeV schedule is not supported with stage modules .* torch.compile"):
        ScheduleDualPipeV([stage(0, compiled), stage(3)], 4)


def test_bad_actions_are_refused(stage: Callable[..., Any]) -> None:
    from torch.distributed.pipelining.schedules import OVERLAP_F_B, SEND_F, ScheduleDualPipeV, _Action, _PipelineScheduleRuntime

    def load(*orders: str) -> None:
        runtime = _PipelineScheduleRuntime([stage(0), stage(3)], 1)
        runtime._prepare_schedule_with_comms(
            {rank: [_Action.from_str(text) for text in order.split()] for rank, order in enumerate(orders)}
        )

    schedule = ScheduleDualPipeV([stage(0), stage(3)], 4)
    with pytest.raises(ValueError, match="Invalid computation type"):
        schedule.register_custom_function(SEND_F, lambda action, ctx: None)
    schedule.register_custom_function(OVERLAP_F_B, lambda action, ctx: None)
    load("0F0 3F0 3B0 0B0", "1F0 2F0 2B0 1B0")
    with pytest.raises(AssertionError, match="without first running Forward"):
        load("0F0 (3B0;3F0)OVERLAP_F_B 0B0", "1F0 2F0 2B0 1B0")
    with pytest.raises(AssertionError, match="Malformed compute schedule"):
        load("0F0 3F0 (0B0;3B0)OVERLAP_F_B", "1F0 2F0 2B0 1B0")
    with pytest.raises(ValueError, match="Expected compute-only schedule but found communication action '0SEND_F0'"):
        load("0F0 0SEND_F0 3F0 3B0 0B0", "1F0 2F0 2B0 1B0")


@pytest.mark.parametrize(("reduction", "factor"), [("", 1), ("0REDUCE_GRAD", 2)])
def test_a_schedule_that_says_all_says_where_gradients_are_scaled(
    environment: Environment, reduction: str, factor: int
) -> None:
    from torch.distributed.pipelining import PipelineStage, schedules
    from torch.distributed.pipelining.schedules import _Action, _PipelineScheduleRuntime
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group(backend="fake", rank=0, world_size=1, store=FakeStore())
    try:
        layer, x, target = torch.nn.Linear(3, 3), torch.ones(4, 3), torch.zeros(4, 3)
        (expected,) = torch.autograd.grad(torch.nn.functional.mse_loss(layer(x), target, reduction="sum"), [layer.bias])
        loss = torch.nn.MSELoss(reduction="sum")
        schedule = _PipelineScheduleRuntime([PipelineStage(layer, 0, 1, torch.device("cpu"))], 2, loss_fn=loss)
        if reduction and hasattr(schedules, "WAIT_REDUCE_GRAD"):
            reduction += " 0WAIT_REDUCE_GRAD"
        order = [_Action.from_str(text) for text in f"0F0 0F1 0I0 0I1 0W0 0W1 {reduction}".split()]
        schedule._prepare_schedule_with_comms({0: order}, format="compute_comms")
        schedule.step(x, target=target, losses=[])
        torch.testing.assert_close(layer.bias.grad * factor, expected)
    finally:
        dist.destroy_process_group()


def test_a_schedule_that_is_made_is_reported(stage: Callable[..., Any], environment: Environment) -> None:
    from torch.distributed.pipelining import ScheduleDualPipeV

    assert not [decision for decision in environment.report.decisions if "DualPipeV" in decision.subject]
    ScheduleDualPipeV([stage(0), stage(3)], 4)
    subjects = [decision.subject for decision in environment.report.decisions if "DualPipeV" in decision.subject]
    assert subjects == (["ScheduleDualPipeV"] if is_lacking(BACKPORT) else [])


if __name__ == "__main__":
    main(sys.argv[1])
