"""DeepSeek V3: latent attention and a mixture of experts, written for one device. V2's shapes are flavours of it.

Its mixture of experts is in `_moe`, its sizes are in `_deepseek_config`.

Shapes, as suffixes of names: B batch, S sequence, D model width, H heads, C width of the latent that keys and values are made
of, Q width of a query's and a key's part without position, R width of the rotary part, P pairs of it (R / 2), X width of a
query or key (Q + R), V width of a value, E experts.

Sources: latent attention https://arxiv.org/abs/2405.04434 (V2), the model https://arxiv.org/abs/2412.19437 (V3), YaRN
https://arxiv.org/abs/2309.00071.

In float32 and in bfloat16 this agrees with Transformers' DeepseekV3 on a CPU; what may differ is the last digit of a matrix
product of an expert, and, in bfloat16, of the sum over experts: here it is made in float32 and rounded once. As there, the
router computes in float32 whatever the weights are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchspan.models import _flex
from torchspan.models._base import ModelSpec
from torchspan.models._deepseek_config import FLAVOURS, ModelConfig
from torchspan.models._hf import HFWeight
from torchspan.models._layers import FeedForward, RMSNorm, draw_weights, region, rotary_periods
from torchspan.models._moe import Balance, MoE

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


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
