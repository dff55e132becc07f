"""How the pieces of a step are traced: by make_fx, on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from torchspan.private import fx


def trace(step: Callable[..., Any], flat: Sequence[Any]) -> GraphModule:
    """The operators that `step` calls for the tensors `flat`; fake ones among them lend the graph their mode."""
    from torch.fx.traceback import preserve_node_meta

    from torchspan.capture._kernels import kernels_kept_whole, views_of_any_size

    with kernels_kept_whole(), views_of_any_size(), preserve_node_meta(), torch.enable_grad():
        return fx.make_fx(step, tracing_mode="fake")(*flat)
