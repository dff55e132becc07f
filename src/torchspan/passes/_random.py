"""Which nodes draw random numbers."""

from __future__ import annotations

import torch
from torch.fx import Node

_RATES = ("dropout_p", "p")


def draws(node: Node) -> bool:
    """Whether a node takes numbers from a random stream; attention and dropout at a rate of 0 take none."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    for index, argument in enumerate(target._schema.arguments):
        if argument.name in _RATES and argument.has_default_value():
            rate = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
            return bool(rate != 0)
    return True
