"""The private names of torch that passes need, imported when they are called for; a new torch breaks here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch.fx import GraphModule


def compile_with_inductor(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a graph that has its backward already, for inputs like these fake ones; shapes are static."""
    from torch._guards import TracingContext, detect_fake_mode, tracing
    from torch._inductor import standalone_compile

    fake_mode = detect_fake_mode(inputs)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if fake_mode is None:
            return standalone_compile(module, list(inputs), dynamic_shapes="from_example_inputs")
        stack.enter_context(tracing(TracingContext(fake_mode)))
        return standalone_compile(module, list(inputs), dynamic_shapes="from_tracing_context")
