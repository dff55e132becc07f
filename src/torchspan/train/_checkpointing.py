"""Activation checkpointing of a model that runs eagerly: torch's own, a block at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from torchspan.core.report import Report
from torchspan.passes._blocks import block_of, patterns_of
from torchspan.passes._costs import EXPENSIVE, answers
from torchspan.train.config import ActivationCheckpoint


def checkpoint_blocks(model: nn.Module, settings: ActivationCheckpoint, report: Report) -> None:
    """Have the blocks of `model` run again in the backward, as `settings` say; names of parameters stay."""
    if settings.mode == "none":
        return
    blocks = [module for path, module in model.named_modules() if path and block_of(path) == path]
    chosen = blocks[settings.every - 1 :: settings.every]
    by_operator = settings.mode == "selective" and settings.selective_ac_option == "op"
    contexts = partial(create_selective_checkpoint_contexts, _Policy()) if by_operator else noop_context_fn
    for block in chosen:
        run = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
        block.forward = run
    reason = "results of products and attention are kept" if by_operator else "what a block is given is kept"
    report.decide("train", "activation checkpointing", f"{len(chosen)} of {len(blocks)} blocks run again", reason)


class _Policy:
    """Keeps what is expensive."""

    def __init__(self) -> None:
        self._patterns = patterns_of(EXPENSIVE)

    def __call__(self, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if answers(operator, self._patterns) else CheckpointPolicy.PREFER_RECOMPUTE
