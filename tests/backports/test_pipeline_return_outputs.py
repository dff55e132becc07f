"""``schedule.step(return_outputs=False)``: the same losses and gradients, and no outputs, on real ranks."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B, schedules

from torchspan.environment.scope import Environment

NUM_STAGES = {ScheduleGPipe: 2, Schedule1F1B: 2, ScheduleInterleaved1F1B: 4}


def run(kind: Any, **options: Any) -> tuple[Any, list[torch.Tensor], list[Any], list[Any]]:
    """What a step gives, the losses, every gradient of this rank, and what its stages have kept."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 4) for _ in range(NUM_STAGES[kind])]
    mine = range(dist.get_rank(), len(layers), dist.get_world_size())
    stages = [PipelineStage(layers[index], index, len(layers), torch.device("cpu")) for index in mine]
    schedule = kind(stages if len(stages) > 1 else stages[0], 4, loss_fn=torch.nn.functional.mse_loss)
    inputs, targets = torch.randn(8, 4), torch.randn(8, 4)
    losses: list[torch.Tensor] = []
    is_last = stages[-1].is_last
    outputs = schedule.step(
        *([inputs] if stages[0].is_first else []), target=targets if is_last else None, losses=losses, **options
    )
    gradients = [parameter.grad for stage in stages for parameter in stage.submod.parameters()]
    return outputs, losses, gradients, [stage.output_chunks for stage in stages]


def outputs_are_given_only_if_wanted() -> None:
    for kind in NUM_STAGES:
        outputs, losses, gradients, _ = run(kind)
        expected, _, _, _ = run(kind, return_outputs=True)
        nothing, same_losses, same_gradients, kept_outputs = run(kind, return_outputs=False)
        assert nothing is None and not any(kept_outputs), kind
        torch.testing.assert_close((outputs, losses, gradients), (expected, same_losses, same_gradients))
        assert (outputs is None) == (dist.get_rank() == 0) and len(losses) == (4 if dist.get_rank() else 0)


def one_step_may_want_them_and_the_next_not() -> None:
    layer = torch.nn.Linear(4, 4)
    schedule = ScheduleGPipe(PipelineStage(layer, dist.get_rank(), 2, torch.device("cpu")), 2)
    for return_outputs in (True, False, True):
        outputs = schedule.step(*([torch.ones(2, 4)] if dist.get_rank() == 0 else []), return_outputs=return_outputs)
        assert (outputs is not None) == (return_outputs and dist.get_rank() == 1)


QUESTIONS = {2: [outputs_are_given_only_if_wanted, one_step_may_want_them_and_the_next_not]}


@pytest.mark.parametrize("question", [question.__name__ for question in QUESTIONS[2]])
def test_on_ranks(failures: dict[str, dict[str, list[str]]], question: str) -> None:
    assert not failures["2"][question], failures["2"][question][0]


def test_the_signature_has_it(environment: Environment) -> None:
    for kind in (schedules.PipelineScheduleSingle, schedules.PipelineScheduleMulti):
        parameter = inspect.signature(kind.step).parameters["return_outputs"]
        assert parameter.default is True and parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
