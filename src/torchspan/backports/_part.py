"""A part of a graph, compiled by inductor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from torchspan.private import fx, inductor


def compile_part(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a part of a graph with inductor, for inputs of these (fake) values; shapes stay as dynamic as they are.

    Inside a compile of torch's, the part shares its shape environment; outside, one is taken from the inputs.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())  # the graph around it has its backward already
        if fx.TracingContext.try_get() is None:
            fake_mode, inputs = _in_one_fake_mode(inputs)
            stack.enter_context(fx.tracing(fx.TracingContext(fake_mode)))
        return inductor.standalone_compile(module, list(inputs), dynamic_shapes="from_tracing_context")


def _in_one_fake_mode(inputs: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    """The fake mode that the inputs share, and the inputs; where they share none, a new one and fake inputs of equal shapes."""
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    modes = {value.fake_mode if isinstance(value, fx.FakeTensor) else None for value in tensors}
    if len(modes) == 1 and None not in modes:
        return modes.pop(), inputs
    fake_mode = fx.FakeTensorMode(shape_env=fx.ShapeEnv())  # a trace with real tensors gives each value a mode of its own
    with fake_mode:
        return fake_mode, [
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            if isinstance(value, torch.Tensor)
            else value
            for value in inputs
        ]
