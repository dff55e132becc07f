"""DeepSeek V3: latent attention and a mixture of experts, written for one device. V2's shapes are flavours of it.

Shapes, as suffixes of names: B batch, S sequence, D model width, H heads, C width of the latent that keys and values are made
of, Q width of a query's and a key's part without position, R width of the rotary part, P pairs of it (R / 2), X width of a
query or key (Q + R), V width of a value, N tokens (B · S), K experts that a token is sent to, E experts, G groups of experts,
F inner width of an expert.

Sources: latent attention and routing in groups https://arxiv.org/abs/2405.04434 (V2), sigmoid scores and the balance of load by
a bias https://arxiv.org/abs/2412.19437 (V3), YaRN https://arxiv.org/abs/2309.00071.

In float32 and in bfloat16 this agrees with Transformers' DeepseekV3 on a CPU; what may differ is the last digit of a matrix
product of an expert, and, in bfloat16, of the sum over experts: here it is made in float32 and rounded once. As there, the
router computes in float32 whatever the weights are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchspan.core.errors import InputError, UnsupportedError
from torchspan.models import _flex
from torchspan.models._base import ModelSpec
from torchspan.models._grouped import grouped_mm
from torchspan.models._hf import HFWeight
from torchspan.models._layers import FeedForward, RMSNorm, draw_weights, region, rotary_periods

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a DeepSeek V3 (the defaults) or V2.

    The first `num_dense_layers` layers have a feed-forward of width `hidden_dim`; each other one has `num_shared_experts` that
    see every token and `num_experts` of which a token is sent to `top_k`, of width `expert_dim` each. Experts are in
    `num_groups`, of which a token reaches `num_limited_groups`. `score_function` is ``sigmoid`` (V3: a group's score is the sum
    of its two best experts', and a bias balances the load) or ``softmax`` (V2: a group's score is its best expert's, no bias).
    `normalize_weights` makes the weights of a token's experts add up to one, before `route_scale`. `balance_rate` is how far a
    training step moves an expert's bias. `q_lora_rank` is None where queries are not made of a latent. `rope_factor` is how far
    YaRN stretches a context of `rope_original_len`; 1 is no YaRN. `max_seq_len` is how many positions the tables have; public
    checkpoints allow `rope_factor` times `rope_original_len`. `attention`, `mask`, `end_of_text` and `annotate_regions` are as
    in Llama 3; experts are marked too.

    >>> ModelConfig(num_experts=10, num_groups=4)
    Traceback (most recent call last):
    torchspan.core.errors.InputError: num_experts is 10, which 4 groups do not divide; expected a multiple of num_groups
    """

    vocab_size: int = 129280
    dim: int = 7168
    num_layers: int = 61
    num_dense_layers: int = 3
    num_heads: int = 128
    hidden_dim: int = 18432
    expert_dim: int = 2048
    num_experts: int = 256
    num_shared_experts: int = 1
    top_k: int = 8
    num_groups: int = 8
    num_limited_groups: int = 4
    score_function: Literal["sigmoid", "softmax"] = "sigmoid"
    normalize_weights: bool = True
    route_scale: float = 2.5
    balance_rate: float = 0.001
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    nope_head_dim: int = 128
    rope_head_dim: int = 64
    v_head_dim: int = 128
    max_seq_len: int = 16384
    rope_theta: float = 10000.0
    rope_factor: float = 40.0
    rope_original_len: int = 4096
    rope_mscale: float = 1.0
    norm_eps: float = 1e-6
    attention: _flex.Attention = "sdpa"
    mask: _flex.Mask = "causal"
    end_of_text: int = 1
    annotate_regions: bool = False

    def __post_init__(self) -> None:
        _flex.check_attention(self.attention, self.mask)
        if not 0 <= self.num_dense_layers <= self.num_layers:
            raise InputError(f"{self.num_dense_layers} of {self.num_layers} layers are dense; expected 0 to num_layers")
        if self.rope_head_dim % 2:
            raise InputError(f"rope_head_dim is {self.rope_head_dim}; the rotary embedding needs an even width")
        if self.num_shared_experts < 1:
            raise InputError(f"num_shared_experts is {self.num_shared_experts}; expected 1 or more")
        if self.rope_factor < 1:
            raise InputError(f"rope_factor is {self.rope_factor}; expected 1, which is no YaRN, or more")
        self._check_routing()

    def _check_routing(self) -> None:
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise InputError(
                f"num_experts is {self.num_experts}, which {self.num_groups} groups do not divide; "
                "expected a multiple of num_groups"
            )
        group_size = self.num_experts // self.num_groups
        if not 1 <= self.num_limited_groups <= self.num_groups:
            raise InputError(f"a token reaches {self.num_limited_groups} of {self.num_groups} groups; expected 1 to num_groups")
        if not 1 <= self.top_k <= self.num_limited_groups * group_size:
            raise InputError(
                f"top_k is {self.top_k}; the {self.num_limited_groups} groups that a token reaches have "
                f"{self.num_limited_groups * group_size} experts, expected 1 to that"
            )
        if self.score_function not in ("sigmoid", "softmax"):
            raise InputError(f"score_function is {self.score_function!r}; expected 'sigmoid' or 'softmax'")
        if self.score_function == "sigmoid" and self.num_groups > 1 and group_size < 2:
            raise InputError(
                f"a group has {group_size} expert; with sigmoid scores it is judged by its two best, expected 2 or more"
            )
        if self.score_function == "softmax" and self.balance_rate:
            raise InputError(f"balance_rate is {self.balance_rate}; softmax scores have no bias to balance, expected 0")

    @property
    def shared_hidden_dim(self) -> int:
        """Inner width of the shared experts, which are one feed-forward."""
        return self.num_shared_experts * self.expert_dim

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key: the part without position, then the rotary part."""
        return self.nope_head_dim + self.rope_head_dim


FLAVOURS = {
    "debugmodel": ModelConfig(
        vocab_size=256,
        dim=256,
        num_layers=6,
        num_dense_layers=1,
        num_heads=16,
        hidden_dim=1024,
        expert_dim=256,
        num_experts=8,
        num_shared_experts=2,
        top_k=3,
        num_groups=1,
        num_limited_groups=1,
        route_scale=1.0,
        q_lora_rank=None,
        max_seq_len=2048,
        rope_factor=1.0,
    ),
    "tiny": ModelConfig(
        vocab_size=256,
        dim=32,
        num_layers=3,
        num_dense_layers=1,
        num_heads=4,
        hidden_dim=64,
        expert_dim=16,
        num_experts=8,
        num_shared_experts=2,
        top_k=2,
        num_groups=4,
        num_limited_groups=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        nope_head_dim=8,
        rope_head_dim=8,
        v_head_dim=8,
        max_seq_len=128,
        rope_original_len=32,
    ),
    "16B": ModelConfig(
        vocab_size=102400,
        dim=2048,
        num_layers=27,
        num_dense_layers=1,
        num_heads=16,
        hidden_dim=10944,
        expert_dim=1408,
        num_experts=64,
        num_shared_experts=2,
        top_k=6,
        num_groups=1,
        num_limited_groups=1,
        score_function="softmax",
        normalize_weights=False,
        route_scale=1.0,
        balance_rate=0.0,
        q_lora_rank=None,
        rope_mscale=0.707,
    ),
    "236B": ModelConfig(
        vocab_size=102400,
        dim=5120,
        num_layers=60,
        num_dense_layers=1,
        hidden_dim=12288,
        expert_dim=1536,
        num_experts=160,
        num_shared_experts=2,
        top_k=6,
        num_limited_groups=3,
        score_function="softmax",
        normalize_weights=False,
        route_scale=16.0,
        balance_rate=0.0,
    ),
    "671B": ModelConfig(),
}
# tokens are bytes: a line is a document
FLAVOURS |= {
    f"{name}_flex_attn": replace(FLAVOURS[name], attention="flex", mask="block_causal", end_of_text=ord("\n"))
    for name in ("debugmodel", "tiny")
}


class Rotary(nn.Module):
    """Turns pairs of neighbouring features by the angle of their position.

    Takes x (B, H, S, R), where features 2p and 2p + 1 are a pair, and tables (S, P); gives (B, H, S, R) with the first of every
    pair, then the second of every pair. Queries and keys are reordered alike, so their products are those of the pairs.
    """

    def forward(self, x_BHSR: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> Tensor:
        first, second = x_BHSR[..., 0::2], x_BHSR[..., 1::2]
        turned = (first * cos_SP - second * sin_SP, second * cos_SP + first * sin_SP)
        return torch.cat(turned, dim=-1).to(x_BHSR.dtype)


class Attention(nn.Module):
    """Causal latent attention: keys and values of all heads are made of one narrow latent, positions of one shared key."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        if config.q_lora_rank is None:
            self.wq = nn.Linear(config.dim, config.num_heads * config.qk_head_dim, bias=False)
        else:
            self.wq_a = nn.Linear(config.dim, config.q_lora_rank, bias=False)
            self.q_norm = RMSNorm(config.q_lora_rank, config.norm_eps)
            self.wq_b = nn.Linear(config.q_lora_rank, config.num_heads * config.qk_head_dim, bias=False)
        self.wkv_a = nn.Linear(config.dim, config.kv_lora_rank + config.rope_head_dim, bias=False)
        self.kv_norm = RMSNorm(config.kv_lora_rank, config.norm_eps)
        self.wkv_b = nn.Linear(config.kv_lora_rank, config.num_heads * (config.nope_head_dim + config.v_head_dim), bias=False)
        self.rotary = Rotary()
        self.wo = nn.Linear(config.num_heads * config.v_head_dim, config.dim, bias=False)
        self.scale = attention_scale(config)

    def forward(self, x_BSD: Tensor, cos_SP: Tensor, sin_SP: Tensor, mask: BlockMask | None = None) -> Tensor:
        config = self.config
        latent_BSC, k_rope_BSR = self.wkv_a(x_BSD).split([config.kv_lora_rank, config.rope_head_dim], dim=-1)
        # -1 and not num_heads: under tensor parallelism each rank has its share of the heads
        q_BHSX = self._queries(x_BSD).unflatten(-1, (-1, config.qk_head_dim)).transpose(1, 2)
        kv_BSHX = self.wkv_b(self.kv_norm(latent_BSC)).unflatten(-1, (-1, config.nope_head_dim + config.v_head_dim))
        k_nope_BHSQ, v_BHSV = kv_BSHX.transpose(1, 2).split([config.nope_head_dim, config.v_head_dim], dim=-1)
        with region("attention" if mask is None else "flex_attention", config.annotate_regions):
            q_nope_BHSQ, q_rope_BHSR = q_BHSX.split([config.nope_head_dim, config.rope_head_dim], dim=-1)
            q_rope_BHSR = self.rotary(q_rope_BHSR, cos_SP, sin_SP)
            k_rope_B1SR = self.rotary(k_rope_BSR.unsqueeze(1), cos_SP, sin_SP)
            k_rope_BHSR = k_rope_B1SR.expand(-1, k_nope_BHSQ.shape[1], -1, -1)
            q_BHSX = torch.cat((q_nope_BHSQ, q_rope_BHSR), dim=-1)
            k_BHSX = torch.cat((k_nope_BHSQ, k_rope_BHSR), dim=-1)
            if mask is None:
                y_BHSV = F.scaled_dot_product_attention(q_BHSX, k_BHSX, v_BHSV, is_causal=True, scale=self.scale)
            else:
                y_BHSV = _flex.attend(q_BHSX, k_BHSX, v_BHSV, mask, self.scale)
            y_BSD = y_BHSV.transpose(1, 2).flatten(-2)
        return self.wo(y_BSD)

    def _queries(self, x_BSD: Tensor) -> Tensor:
        """Queries of all heads side by side: (B, S, H · X)."""
        if self.config.q_lora_rank is None:
            return self.wq(x_BSD)
        return self.wq_b(self.q_norm(self.wq_a(x_BSD)))


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


class TransformerBlock(nn.Module):
    """Attention, and a feed-forward or a mixture of experts, each on normed input and added to the stream."""

    def __init__(self, config: ModelConfig, is_dense: bool) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.is_dense = is_dense
        if is_dense:
            self.feed_forward = FeedForward(config.dim, config.hidden_dim, config.annotate_regions)
        else:
            self.moe = MoE(config)

    def forward(self, x_BSD: Tensor, cos_SP: Tensor, sin_SP: Tensor, mask: BlockMask | None = None) -> Tensor:
        h_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos_SP, sin_SP, mask)
        feed_forward = self.feed_forward if self.is_dense else self.moe
        return h_BSD + feed_forward(self.ffn_norm(h_BSD))


class DeepSeekV3(nn.Module):
    """Tokens to logits.

    >>> model = DeepSeekV3(FLAVOURS["tiny"]).init_weights(0)
    >>> model(torch.zeros(2, 5, dtype=torch.long)).shape
    torch.Size([2, 5, 256])
    """

    cos_SP: Tensor
    sin_SP: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(TransformerBlock(config, i < config.num_dense_layers) for i in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        cos_SP, sin_SP = rotary_tables(config)
        self.register_buffer("cos_SP", cos_SP, persistent=False)
        self.register_buffer("sin_SP", sin_SP, persistent=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Logits (B, S, vocabulary) of the tokens (B, S)."""
        num_tokens = tokens_BS.shape[1]
        cos_SP, sin_SP = self.cos_SP[:num_tokens], self.sin_SP[:num_tokens]
        mask = _flex.mask_of(tokens_BS, self.config)
        x_BSD = self.tok_embeddings(tokens_BS)
        for layer in self.layers:
            x_BSD = layer(x_BSD, cos_SP, sin_SP, mask)
        logits: Tensor = self.output(self.norm(x_BSD))
        return logits

    def init_weights(self, seed: int) -> DeepSeekV3:
        """Draw every weight from `seed` alone, whatever was drawn before, and set every expert's bias to zero."""
        draw_weights(self, self.config.num_layers, seed)
        for module in self.modules():
            if isinstance(module, Balance):
                module.bias_E.zero_()
        return self


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines (S, P) of the angle by which each position turns each pair of features, float32.

    With YaRN, a pair that turns `FAST_TURNS` times or more in the context that the model was first trained on keeps its
    frequency, one that turns `SLOW_TURNS` times or less is slowed by `rope_factor`, and those between are mixed by their place.

    >>> [t.shape for t in rotary_tables(FLAVOURS["tiny"])]
    [torch.Size([128, 4]), torch.Size([128, 4])]
    """
    period_P = rotary_periods(config.rope_head_dim, config.rope_theta)
    frequency_P = 1.0 / period_P
    if config.rope_factor > 1:
        slowed_P = 1.0 / (config.rope_factor * period_P)
        kept_P = 1 - _ramp(config)
        frequency_P = slowed_P * (1 - kept_P) + frequency_P * kept_P
    angle_SP = torch.outer(torch.arange(config.max_seq_len, dtype=torch.float32), frequency_P)
    return angle_SP.cos(), angle_SP.sin()


FAST_TURNS, SLOW_TURNS = 32.0, 1.0


def _ramp(config: ModelConfig) -> Tensor:
    """How far each pair is on its way from fast, 0, to slow, 1: (P)."""

    def place(num_turns: float) -> float:
        """The pair, as a fraction of their order, that turns `num_turns` times in the original context."""
        wavelength = config.rope_original_len / (num_turns * 2 * math.pi)
        return config.rope_head_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    begin = max(math.floor(place(FAST_TURNS)), 0)
    end = min(math.ceil(place(SLOW_TURNS)), config.rope_head_dim - 1)
    num_between = end - begin or 0.001  # none between: a step
    return ((torch.arange(config.rope_head_dim // 2, dtype=torch.float32) - begin) / num_between).clamp(0, 1)


def attention_scale(config: ModelConfig) -> float:
    """By what products of queries and keys are multiplied before the softmax; YaRN makes it larger, so that it stays as sharp.

    >>> attention_scale(FLAVOURS["debugmodel"]) == FLAVOURS["debugmodel"].qk_head_dim ** -0.5
    True
    """
    sharpness = 1.0 if config.rope_factor <= 1 else 0.1 * config.rope_mscale * math.log(config.rope_factor) + 1.0
    return config.qk_head_dim**-0.5 * sharpness * sharpness


def hf_weights(config: ModelConfig) -> list[HFWeight]:
    """The names in public checkpoints of V2 and V3, which have a matrix for each expert."""
    weights = [
        HFWeight("tok_embeddings.weight", ("model.embed_tokens.weight",)),
        HFWeight("norm.weight", ("model.norm.weight",)),
        HFWeight("output.weight", ("lm_head.weight",)),
    ]
    for layer in range(config.num_layers):
        weights += _layer_weights(config, f"layers.{layer}", f"model.layers.{layer}", is_dense=layer < config.num_dense_layers)
    return weights


def _layer_weights(config: ModelConfig, prefix: str, hf_prefix: str, is_dense: bool) -> list[HFWeight]:
    names = _LAYER_NAMES | (_QUERY_NAMES if config.q_lora_rank is None else _LOW_RANK_QUERY_NAMES)
    names |= _feed_forward_names("feed_forward", "mlp") if is_dense else _MOE_NAMES
    weights = [HFWeight(f"{prefix}.{name}.weight", (f"{hf_prefix}.{public}.weight",)) for name, public in names.items()]
    if is_dense:
        return weights
    for name, public in _feed_forward_names("moe.experts", "").items():
        experts = (f"{hf_prefix}.mlp.experts.{expert}{public}.weight" for expert in range(config.num_experts))
        weights.append(HFWeight(f"{prefix}.{name}", tuple(experts), stacked=True))
    if config.score_function == "sigmoid":
        weights.append(HFWeight(f"{prefix}.moe.balance.bias_E", (f"{hf_prefix}.mlp.gate.e_score_correction_bias",)))
    return weights


def _feed_forward_names(prefix: str, hf_prefix: str) -> dict[str, str]:
    return {
        f"{prefix}.w1": f"{hf_prefix}.gate_proj",
        f"{prefix}.w2": f"{hf_prefix}.down_proj",
        f"{prefix}.w3": f"{hf_prefix}.up_proj",
    }


_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.wkv_a": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_norm": "self_attn.kv_a_layernorm",
    "attention.wkv_b": "self_attn.kv_b_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
_QUERY_NAMES = {"attention.wq": "self_attn.q_proj"}
_LOW_RANK_QUERY_NAMES = {
    "attention.wq_a": "self_attn.q_a_proj",
    "attention.q_norm": "self_attn.q_a_layernorm",
    "attention.wq_b": "self_attn.q_b_proj",
}
_MOE_NAMES = {"moe.router.gate": "mlp.gate"} | _feed_forward_names("moe.shared_experts", "mlp.shared_experts")


def hf_ignored(config: ModelConfig) -> str:
    """Public checkpoints of V3 have one layer more, which predicts a second token; it is no part of this model."""
    return rf"model\.layers\.{config.num_layers}\..*"


MODEL = ModelSpec(
    name="deepseek_v3",
    summary="DeepSeek V3 and V2: latent attention, mixture of experts with shared experts, balanced by a bias",
    flavours=FLAVOURS,
    build=DeepSeekV3,
    hf_weights=hf_weights,
    hf_ignored=hf_ignored,
    tensor_parallel={
        "tok_embeddings": "embedding",
        "layers.*.attention_norm": "sequence",
        "layers.*.attention": "gather_sequence",
        "layers.*.attention.wq?": "column",
        "layers.*.attention.wq_a?": "replicate",
        "layers.*.attention.q_norm?": "replicate",
        "layers.*.attention.wq_b?": "column",
        "layers.*.attention.wkv_a": "replicate",
        "layers.*.attention.kv_norm": "replicate",
        "layers.*.attention.wkv_b": "column",
        "layers.*.attention.rotary": "to_local",
        "layers.*.attention.wo": "row",
        "layers.*.ffn_norm": "sequence",
        "layers.*.feed_forward?": "gather_sequence",
        "layers.*.feed_forward.w1?": "column",
        "layers.*.feed_forward.w3?": "column",
        "layers.*.feed_forward.w2?": "row",
        "layers.*.moe.router.gate?": "tokens",
        "layers.*.moe.shared_experts?": "gather_sequence",
        "layers.*.moe.shared_experts.w1?": "column",
        "layers.*.moe.shared_experts.w3?": "column",
        "layers.*.moe.shared_experts.w2?": "row",
        "norm": "sequence",
        "output": "logits",
    },
    expert_parallel={"layers.*.moe.experts?": "experts", "layers.*.moe.balance?": "counts"},
    sizes=("vocab_size", "num_heads", "hidden_dim", "shared_hidden_dim"),
)
