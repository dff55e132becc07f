"""Layers that several models have: the norm, the gated feed-forward, marked regions, and how weights are drawn.

Shapes, as suffixes of names: B batch, S sequence, D model width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchspan.core.errors import InputError, UnsupportedError


class RMSNorm(nn.Module):
    """Scales each position to a root mean square of one, then by a weight per feature (https://arxiv.org/abs/1910.07467).

    The scale is computed in float32, and its product with the input is rounded to the input's dtype before the weight is
    applied, as in Transformers.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_BSD: Tensor) -> Tensor:
        wide_BSD = x_BSD.float()  # once, so that its gradient is added up in float32
        scale_BS1 = torch.rsqrt(wide_BSD.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide_BSD * scale_BS1).to(x_BSD.dtype) * self.weight


class FeedForward(nn.Module):
    """SwiGLU: a gated feed-forward of inner width `hidden_dim` (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int, annotate_regions: bool) -> None:
        super().__init__()
        self.annotate_regions = annotate_regions
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        with region("feed_forward", self.annotate_regions):
            return self.w2(F.silu(self.w1(x_BSD)) * self.w3(x_BSD))


def region(name: str, is_marked: bool) -> AbstractContextManager[Any]:
    """Marks what runs inside as the region `name` for inductor, if `is_marked`; UnsupportedError where torch cannot mark."""
    if not is_marked:
        return nullcontext()
    annotate = getattr(torch.fx.traceback, "annotate", None)
    if annotate is None:
        raise UnsupportedError(
            f"torch {torch.__version__} has no torch.fx.traceback.annotate (2.10 and later have it); "
            "activate torchspan, which provides it, or build the model with annotate_regions=False"
        )
    context: AbstractContextManager[Any] = annotate({"compile_with_inductor": name})
    return context


def rotary_periods(head_dim: int, theta: float) -> Tensor:
    """Positions (head_dim / 2) in which each pair of features turns by one radian, float32.

    Its reciprocal is rounded as Transformers rounds a frequency; the power of a negative exponent is not.
    """
    return theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


@torch.no_grad()
def draw_weights(model: nn.Module, num_layers: int, seed: int) -> None:
    """Draw every parameter of `model` from `seed` alone: ones for vectors, truncated normals for the rest.

    What adds to the residual stream (`wo` and `w2`) gets a standard deviation that shrinks with the number of layers.
    InputError for a model that is parallel already: its parameters are not whole.
    """
    if any(hasattr(parameter, "placements") for parameter in model.parameters()):  # DTensors
        raise InputError(
            "the model's parameters are shared between ranks already; draw weights before the model is made parallel"
        )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        deep = name.removesuffix(".weight").endswith((".wo", ".w2"))
        std = 0.02 / (2 * num_layers) ** 0.5 if deep else 0.02
        nn.init.trunc_normal_(parameter, std=std, a=-3 * std, b=3 * std, generator=generator)
