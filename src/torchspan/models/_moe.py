"""The mixture of experts of DeepSeek V3 and V2: how experts are chosen, what they compute, and how their load is balanced.

Shapes, as suffixes of names: B batch, S sequence, D model width, N tokens (B · S), K experts that a token is sent to, E
experts, G groups of experts, F inner width of an expert.

Sources: routing in groups https://arxiv.org/abs/2405.04434 (V2), sigmoid scores and the balance of load by a bias
https://arxiv.org/abs/2412.19437 (V3).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchspan.core.errors import UnsupportedError
from torchspan.models._deepseek_config import ModelConfig
from torchspan.models._grouped import grouped_mm
from torchspan.models._layers import FeedForward, region


class Gate(nn.Linear):
    """A linear layer that computes in float32, whatever its weight and input are: choices hang on small differences."""

    def forward(self, x_ND: Tensor) -> Tensor:
        return F.linear(x_ND.float(), self.weight.float())


class Router(nn.Module):
    """Chooses the experts of each token, and their weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = Gate(config.dim, config.num_experts, bias=False)

    def forward(self, x_ND: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (N, K), float32, and experts (N, K), int64, ascending; `bias_E` counts in the choice, not in the weights."""
        logits_NE = self.gate(x_ND)
        scores_NE = logits_NE.sigmoid() if self.config.score_function == "sigmoid" else logits_NE.softmax(dim=-1)
        # in order, so that the sum over a token's experts does not hang on the order in which topk gives them
        experts_NK = (
            self._choice(scores_NE.detach(), bias_E).topk(self.config.top_k, dim=-1, sorted=False).indices.sort(-1).values
        )
        weights_NK = scores_NE.gather(1, experts_NK)
        if self.config.normalize_weights:
            weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + 1e-20)
        return weights_NK * self.config.route_scale, experts_NK

    def _choice(self, scores_NE: Tensor, bias_E: Tensor) -> Tensor:
        """The scores by which experts are chosen: -inf for those of groups that a token does not reach."""
        num_groups = self.config.num_groups
        if self.config.score_function == "sigmoid":
            scores_NE = scores_NE + bias_E
        if self.config.num_limited_groups == num_groups:
            return scores_NE
        scores_NGE = scores_NE.unflatten(1, (num_groups, -1))
        num_best = 2 if self.config.score_function == "sigmoid" else 1
        group_scores_NG = scores_NGE.topk(num_best, dim=-1).values.sum(-1)
        groups_NG = group_scores_NG.topk(self.config.num_limited_groups, dim=-1, sorted=False).indices
        is_reached_NG1 = torch.zeros_like(group_scores_NG).scatter(1, groups_NG, 1.0).unsqueeze(-1) > 0
        return scores_NGE.masked_fill(~is_reached_NG1, -math.inf).flatten(1)


class Experts(nn.Module):
    """The routed experts: a SwiGLU each, of as many experts as the weights have.

    Under expert parallelism a rank has its share of the weights, and is called with the rows and counts of these experts.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.annotate_regions = config.annotate_regions
        self.w1 = _stack(config.num_experts, config.dim, config.expert_dim)
        self.w2 = _stack(config.num_experts, config.expert_dim, config.dim)
        self.w3 = _stack(config.num_experts, config.dim, config.expert_dim)

    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        """What the experts make of the rows `x_ND`, which are sorted by expert; `counts_E`, int64: how many each has."""
        with region("experts", self.annotate_regions):
            h_NF = F.silu(grouped_mm(x_ND, self.w1, counts_E)) * grouped_mm(x_ND, self.w3, counts_E)
            return grouped_mm(h_NF, self.w2, counts_E)


def _stack(num_experts: int, width: int, output_width: int) -> nn.Parameter:
    """A matrix for each expert, input features first, drawn from torch's generator as those of ``nn.Linear`` are."""
    return nn.Parameter(torch.empty(num_experts, width, output_width).uniform_(-(width**-0.5), width**-0.5))


class Balance(nn.Module):
    """The bias of each expert in the choice, moved so that experts get the same number of tokens (V3, section 2.1.2).

    `bias_E` is always float32, also in a model that is moved to bfloat16, whose steps of it would be lost in rounding. Where
    scores are softmax it stays zero and is no part of the state dict.
    """

    bias_E: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.rate = config.balance_rate
        bias_E = torch.zeros(config.num_experts, dtype=torch.float32)
        self.register_buffer("bias_E", bias_E, persistent=config.score_function == "sigmoid")

    @torch.no_grad()
    def forward(self, counts_E: Tensor) -> None:
        """In training, move the bias by `rate`, in place: up for experts with fewer tokens than the mean, down for others.

        `counts_E`, int64: the tokens of each expert in this forward. UnsupportedError in a forward that activation
        checkpointing runs again: it would choose experts by a bias that has moved, and so compute another forward's gradients.
        """
        if self.training and self.rate:
            if torch._C._current_graph_task_id() != -1:  # inside a backward
                raise UnsupportedError(
                    "a mixture of experts whose load is balanced cannot be run again in the backward, as activation "
                    "checkpointing does; checkpoint attention alone, or set balance_rate=0"
                )
            # how far below the mean, times the number of experts: whole numbers
            missing_E = counts_E.sum() - counts_E * counts_E.shape[0]
            self.bias_E.add_(missing_E.sign() * self.rate)

    def _apply(self, fn: Any, recurse: bool = True) -> Balance:
        bias_E = self.bias_E
        super()._apply(fn, recurse)
        if self.bias_E.dtype != torch.float32:
            self.bias_E = bias_E.to(self.bias_E.device)
        return self


class MoE(nn.Module):
    """A mixture of experts: those that every token meets, and those that it is sent to."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared_experts = FeedForward(config.dim, config.shared_hidden_dim, config.annotate_regions)
        self.balance = Balance(config)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_ND = x_BSD.flatten(0, 1)
        weights_NK, experts_NK = self.router(x_ND, self.balance.bias_E)
        counts_E = self._counts(experts_NK)
        # Each token once for each of its experts, then sorted: gathering by a permutation has a deterministic gradient
        order = experts_NK.flatten().argsort(stable=True)
        rows_ND = x_ND.repeat_interleave(experts_NK.shape[1], dim=0).index_select(0, order)
        rows_ND = self.experts(rows_ND, counts_E).index_select(0, order.argsort())
        routed_ND = (rows_ND.unflatten(0, experts_NK.shape) * weights_NK.unsqueeze(-1)).sum(1).to(x_ND.dtype)
        self.balance(counts_E)
        return routed_ND.unflatten(0, x_BSD.shape[:2]) + self.shared_experts(x_BSD)

    def _counts(self, experts_NK: Tensor) -> Tensor:
        """How many tokens each expert gets: (E), int64. Whole numbers add up to the same in any order."""
        chosen = experts_NK.flatten()
        return chosen.new_zeros(self.num_experts).scatter_add(0, chosen, torch.ones_like(chosen))
