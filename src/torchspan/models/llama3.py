"""Llama 3: a decoder-only transformer, written for one device.

Shapes, as suffixes of names: B batch, S sequence, D model width, H query heads, K key and value heads, E width of a head,
F width of the feed-forward, V vocabulary.

Sources: rotary embedding https://arxiv.org/abs/2104.09864 (in the layout that turns the two halves of a head against each
other, as Transformers' checkpoints have it), grouped-query attention https://arxiv.org/abs/2305.13245, the sizes
https://arxiv.org/abs/2407.21783. 8B and 70B are Llama 3, 405B is Llama 3.1, 1B is Llama 3.2, whose output weight is the
embedding's.

Logits and gradients are bitwise those of Transformers' Llama on a CPU, in float32 and in bfloat16, if both take the same dtype
for the tables of the rotary embedding. A Transformers model that is built and then moved by ``.to(torch.bfloat16)`` also rounds
the frequencies from which it computes its tables, and so turns by other angles; one that is loaded with
``dtype=torch.bfloat16`` does not. Here the tables are computed once in float32, and only then rounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchspan.core.errors import InputError
from torchspan.models import _flex
from torchspan.models._base import ModelSpec
from torchspan.models._hf import HFWeight
from torchspan.models._layers import FeedForward, RMSNorm, draw_weights, region, rotary_periods

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a Llama 3.

    `annotate_regions` marks attention and feed-forward with ``torch.fx.traceback.annotate({"compile_with_inductor": …})``,
    which torch has since 2.10 and torchspan's backport gives to older ones; without it the model is plain torch.
    With `tie_embeddings` the output's weight is the embedding's.
    `rope_factor` stretches slow rotations as Llama 3.1 and later do; `max_seq_len` is how many positions the tables have.
    `attention` is what computes attention, ``sdpa`` or ``flex``. With `mask` ``block_causal``, which needs ``flex``, a token
    sees its own document only; the token `end_of_text` is the last of a document.

    >>> ModelConfig(dim=100, num_heads=3)
    Traceback (most recent call last):
    torchspan.core.errors.InputError: dim is 100, which 3 heads do not divide; expected a multiple of num_heads
    """

    vocab_size: int = 128256
    dim: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 8
    hidden_dim: int = 14336
    max_seq_len: int = 8192
    rope_theta: float = 500000.0
    rope_factor: float = 1.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    attention: _flex.Attention = "sdpa"
    mask: _flex.Mask = "causal"
    end_of_text: int = 128001
    annotate_regions: bool = False

    def __post_init__(self) -> None:
        _flex.check_attention(self.attention, self.mask)
        if self.dim % self.num_heads:
            raise InputError(f"dim is {self.dim}, which {self.num_heads} heads do not divide; expected a multiple of num_heads")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_heads is {self.num_heads}, which {self.num_kv_heads} key and value heads do not divide; "
                "expected a multiple of num_kv_heads"
            )
        if self.head_dim % 2:
            raise InputError(f"a head is {self.head_dim} wide; the rotary embedding needs an even width")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.num_heads


ORIGINAL_SEQ_LEN = 8192
MIN_TURNS, MAX_TURNS = 1.0, 4.0

FLAVOURS = {
    "debugmodel": ModelConfig(
        vocab_size=256, dim=256, num_layers=6, num_heads=8, num_kv_heads=4, hidden_dim=768, max_seq_len=2048
    ),
    "tiny": ModelConfig(vocab_size=256, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=64, max_seq_len=128),
    "1B": ModelConfig(
        dim=2048, num_layers=16, num_heads=32, num_kv_heads=8, hidden_dim=8192, rope_factor=32.0, tie_embeddings=True
    ),
    "8B": ModelConfig(),
    "70B": ModelConfig(dim=8192, num_layers=80, num_heads=64, num_kv_heads=8, hidden_dim=28672),
    "405B": ModelConfig(dim=16384, num_layers=126, num_heads=128, num_kv_heads=8, hidden_dim=53248, rope_factor=8.0),
}
# tokens are bytes: a line is a document
FLAVOURS |= {
    f"{name}_flex_attn": replace(FLAVOURS[name], attention="flex", mask="block_causal", end_of_text=ord("\n"))
    for name in ("debugmodel", "tiny")
}


class Attention(nn.Module):
    """Causal grouped-query attention with a rotary embedding of positions; FlexAttention where it is given a mask."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.annotate_regions = config.annotate_regions
        kv_width = config.num_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, config.dim, bias=False)
        self.wk = nn.Linear(config.dim, kv_width, bias=False)
        self.wv = nn.Linear(config.dim, kv_width, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x_BSD: Tensor, cos_SE: Tensor, sin_SE: Tensor, mask: BlockMask | None = None) -> Tensor:
        # -1 and not num_heads: under tensor parallelism each rank has its share of the heads
        q_BHSE = self.wq(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        k_BKSE = self.wk(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        v_BKSE = self.wv(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        with region("attention" if mask is None else "flex_attention", self.annotate_regions):
            q_BHSE, k_BKSE = rotate(q_BHSE, cos_SE, sin_SE), rotate(k_BKSE, cos_SE, sin_SE)
            if mask is None:
                y_BHSE = F.scaled_dot_product_attention(q_BHSE, k_BKSE, v_BKSE, is_causal=True, enable_gqa=True)
            else:
                y_BHSE = _flex.attend(q_BHSE, k_BKSE, v_BKSE, mask)
            y_BSD = y_BHSE.transpose(1, 2).flatten(-2)
        return self.wo(y_BSD)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each on normed input and added to the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config.dim, config.hidden_dim, config.annotate_regions)

    def forward(self, x_BSD: Tensor, cos_SE: Tensor, sin_SE: Tensor, mask: BlockMask | None = None) -> Tensor:
        h_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos_SE, sin_SE, mask)
        return h_BSD + self.feed_forward(self.ffn_norm(h_BSD))


class Llama3(nn.Module):
    """Tokens to logits.

    >>> model = Llama3(FLAVOURS["tiny"])
    >>> model(torch.zeros(2, 5, dtype=torch.long)).shape
    torch.Size([2, 5, 256])
    """

    cos_SE: Tensor
    sin_SE: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        cos_SE, sin_SE = rotary_tables(config.max_seq_len, config.head_dim, config.rope_theta, config.rope_factor)
        self.register_buffer("cos_SE", cos_SE, persistent=False)
        self.register_buffer("sin_SE", sin_SE, persistent=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Logits (B, S, V) of the tokens (B, S)."""
        num_tokens = tokens_BS.shape[1]
        cos_SE, sin_SE = self.cos_SE[:num_tokens], self.sin_SE[:num_tokens]
        mask = _flex.mask_of(tokens_BS, self.config)
        x_BSD = self.tok_embeddings(tokens_BS)
        for layer in self.layers:
            x_BSD = layer(x_BSD, cos_SE, sin_SE, mask)
        logits_BSV: Tensor = self.output(self.norm(x_BSD))
        return logits_BSV

    def init_weights(self, seed: int) -> Llama3:
        """Draw every weight from `seed` alone, whatever was drawn before: truncated normals, smaller in deeper blocks."""
        draw_weights(self, self.config.num_layers, seed)
        return self


def rotary_tables(num_positions: int, head_dim: int, theta: float, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines (S, E) of the angle by which each position turns each feature of a head, float32.

    `factor` is that by which Llama 3.1 and later stretch slow rotations; 1 stretches none.

    >>> [t.shape for t in rotary_tables(7, 4, 1e4)]
    [torch.Size([7, 4]), torch.Size([7, 4])]
    """
    frequency_E = _stretched(1.0 / rotary_periods(head_dim, theta), factor)
    angle_SE = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequency_E).repeat(1, 2)
    return angle_SE.cos(), angle_SE.sin()


def _stretched(frequency_E: Tensor, factor: float) -> Tensor:
    """Frequencies for a context longer than the 8,192 positions that the model was first trained on.

    A feature that turns four times or more in that many positions keeps its frequency; one that turns once or less is slowed
    by `factor`; between the two the change is linear in the number of turns.
    """
    if factor == 1:
        return frequency_E
    num_turns_E = ORIGINAL_SEQ_LEN / (2 * math.pi / frequency_E)
    kept_E = ((num_turns_E - MIN_TURNS) / (MAX_TURNS - MIN_TURNS)).clamp(0, 1)
    return (1 - kept_E) * frequency_E / factor + kept_E * frequency_E


def rotate(x_BHSE: Tensor, cos_SE: Tensor, sin_SE: Tensor) -> Tensor:
    """Turn the two halves of each head against each other by the angle of their position."""
    left, right = x_BHSE.chunk(2, dim=-1)
    turned_BHSE = torch.cat((-right, left), dim=-1)
    return (x_BHSE * cos_SE + turned_BHSE * sin_SE).to(x_BHSE.dtype)


def hf_weights(config: ModelConfig) -> list[HFWeight]:
    """The names in Transformers' checkpoints; layouts are the same, also that of the rotary embedding's halves."""
    embedding = "model.embed_tokens"
    names = {"tok_embeddings": embedding, "norm": "model.norm", "output": embedding if config.tie_embeddings else "lm_head"}
    for layer in range(config.num_layers):
        for name, hf_name in _LAYER_NAMES.items():
            names[f"layers.{layer}.{name}"] = f"model.layers.{layer}.{hf_name}"
    return [HFWeight(f"{name}.weight", (f"{hf_name}.weight",)) for name, hf_name in names.items()]


_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


MODEL = ModelSpec(
    name="llama3",
    summary="Llama 3: RMSNorm, rotary embedding, grouped-query attention, SwiGLU",
    flavours=FLAVOURS,
    build=Llama3,
    hf_weights=hf_weights,
    tensor_parallel={
        "tok_embeddings": "embedding",
        "layers.*.attention_norm": "sequence",
        "layers.*.attention": "gather_sequence",
        "layers.*.attention.wq": "column",
        "layers.*.attention.wk": "column",
        "layers.*.attention.wv": "column",
        "layers.*.attention.wo": "row",
        "layers.*.ffn_norm": "sequence",
        "layers.*.feed_forward": "gather_sequence",
        "layers.*.feed_forward.w1": "column",
        "layers.*.feed_forward.w3": "column",
        "layers.*.feed_forward.w2": "row",
        "norm": "sequence",
        "output": "logits",
    },
    sizes=("vocab_size", "num_heads", "num_kv_heads", "hidden_dim"),
)
