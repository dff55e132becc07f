"""The sizes of a DeepSeek V3 or V2, and those that have a name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torchspan.core.errors import InputError
from torchspan.models import _flex


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
