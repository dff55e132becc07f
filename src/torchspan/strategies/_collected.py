"""Whether Transformers gathers what the blocks of a model compute: hidden states, attentions, logits of routers."""

from __future__ import annotations

import sys
from typing import Any

import torch

_CAPTURING = "transformers.utils.output_capturing"


def is_gathering() -> bool:
    """Whether hooks on the blocks that are called here and now keep what these compute, in a list outside of the model.

    A block that is compiled by itself would depend on what other blocks have put there.
    """
    capturing = sys.modules.get(_CAPTURING)
    active = getattr(capturing, "_active_collector", None)
    return active is not None and bool(active.get())


def register(program: Any) -> None:
    """Note for the models in `program` what Transformers can gather of them, as their making does; unpickling does not."""
    registry = getattr(sys.modules.get(_CAPTURING), "_CAN_RECORD_REGISTRY", None)
    owner = getattr(program, "__self__", program)
    if registry is None or not isinstance(owner, torch.nn.Module):
        return
    for module in owner.modules():
        if hasattr(module, "_can_record_outputs"):
            registry[module] = module._can_record_outputs
