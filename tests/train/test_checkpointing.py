"""``--activation_checkpoint.mode``: on a captured graph a pass, eagerly torch's own; either way every bit stays."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from torchspan.core.report import Report
from torchspan.train.check import check
from torchspan.train.config import ActivationCheckpoint, Compile, TrainConfig, Training
from torchspan.train.loop import train

TINY = TrainConfig(config="tiny", training=Training(steps=2, global_batch_size=2, seq_len=16))
EAGER = replace(TINY, compile=Compile(enable=False))
FULL, BY_OPERATOR = ActivationCheckpoint("full"), ActivationCheckpoint("selective")
EVERY_SECOND, BUDGET = ActivationCheckpoint("selective", "2"), ActivationCheckpoint("memory_budget", memory_budget=0.6)


class Counts(TorchDispatchMode):
    """How often each operator is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(operator)] += 1
        return operator(*args, **(kwargs or {}))


def operators(config: TrainConfig) -> tuple[Counter[str], tuple[float, ...]]:
    with Counts() as counts:
        losses = train(config).losses
    return counts.calls, losses


@pytest.fixture(scope="module")
def plain() -> tuple[Counter[str], tuple[float, ...]]:
    return operators(EAGER)


@pytest.mark.parametrize(
    ("settings", "num_products", "num_functions"),
    # for each of two blocks and two steps: seven products, one silu
    [(FULL, 28, 4), (BY_OPERATOR, 0, 4), (EVERY_SECOND, 14, 2)],
)
def test_eager_blocks_run_again_and_give_the_bits_of_those_that_do_not(
    plain: Any, settings: ActivationCheckpoint, num_products: int, num_functions: int
) -> None:
    calls, losses = operators(replace(EAGER, activation_checkpoint=settings))
    more = calls - plain[0]
    assert losses == plain[1]
    assert more["aten.silu.default"] == num_functions
    # torch stops a second run once all is there: the last product of a block is not made again
    assert num_products - 4 <= more["aten.mm.default"] <= num_products


@pytest.mark.parametrize("settings", [FULL, BY_OPERATOR, EVERY_SECOND, BUDGET])
def test_a_captured_graph_recomputes_and_gives_the_bits_of_eager(plain: Any, settings: ActivationCheckpoint) -> None:
    report = Report()
    result = train(replace(TINY, activation_checkpoint=settings), report)
    assert result.losses == plain[1]
    assert report.figures["sac_kept_after_bytes"] < 0.9 * report.figures["sac_kept_before_bytes"]


def test_the_pass_stands_where_its_stage_begins() -> None:
    passes = "transformer_block_bucketing,regional_inductor"
    config = replace(TINY, compile=Compile(passes=passes), activation_checkpoint=FULL)
    assert str(check(config, 1).pipeline) == f"apply_sac{{save=''}},{passes}"
    joint = replace(config, compile=Compile(joint_passes="cpu_offload", passes=passes))
    assert str(check(joint, 1).pipeline) == f"apply_sac{{save=''}},cpu_offload,{passes}"
    assert str(check(replace(EAGER, activation_checkpoint=FULL), 1).pipeline) == ""


def test_a_balanced_mixture_of_experts_counts_its_tokens_once() -> None:
    """The balance moves by what was counted, and so the losses: those of the second step tell."""
    experts = replace(TINY, module="deepseek_v3", training=replace(TINY.training, steps=3))
    eager = train(replace(experts, compile=Compile(enable=False)))
    assert train(replace(experts, activation_checkpoint=FULL)).losses == eager.losses
