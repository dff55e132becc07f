"""How the pieces of a step are traced: by make_fx, on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule


def trace(step: Callable[..., Any], flat: Sequence[Any]) -> GraphModule:
    """The operators that `step` calls for the tensors `flat`; fake ones among them lend the graph their mode."""
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.traceback import preserve_node_meta

    from torchspan.capture import _torch

    with _torch.kernels_kept_whole(), _torch.views_of_any_size(), preserve_node_meta(), torch.enable_grad():
        return make_fx(step, tracing_mode="fake")(*flat)
