"""Llama 3: a decoder-only transformer, written for one device.

Shapes, as suffixes of names: B batch, S sequence, D model width, H query heads, K key and value heads, E width of a head,
F width of the feed-forward, V vocabulary.

Sources: RMSNorm https://arxiv.org/abs/1910.07467, rotary embedding https://arxiv.org/abs/2104.09864 (in the layout that turns
the two halves of a head against each other), grouped-query attention https://arxiv.org/abs/2305.13245, SwiGLU
https://arxiv.org/abs/2002.05202, the sizes https://arxiv.org/abs/2407.21783.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchspan.core.errors import InputError, UnsupportedError
from torchspan.models._base import ModelSpec


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a Llama 3.

    `annotate_regions` marks attention and feed-forward with ``torch.fx.traceback.annotate({"compile_with_inductor": …})``,
    which torch has since 2.10 and torchspan's backport gives to older ones; without it the model is plain torch.

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
    norm_eps: float = 1e-5
    annotate_regions: bool = False

    def __post_init__(self) -> None:
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


FLAVOURS = {
    "debugmodel": ModelConfig(
        vocab_size=256, dim=256, num_layers=6, num_heads=8, num_kv_heads=4, hidden_dim=768, max_seq_len=2048
    ),
    "tiny": ModelConfig(vocab_size=256, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=64, max_seq_len=128),
    "1B": ModelConfig(dim=2048, num_layers=16, num_heads=32, num_kv_heads=8, hidden_dim=8192),
    "8B": ModelConfig(),
    "70B": ModelConfig(dim=8192, num_layers=80, num_heads=64, num_kv_heads=8, hidden_dim=28672),
}


class RMSNorm(nn.Module):
    """Scales each position to a root mean square of one, then by a weight per feature."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_BSD: Tensor) -> Tensor:
        scale_BS1 = torch.rsqrt(x_BSD.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (x_BSD.float() * scale_BS1).to(x_BSD.dtype) * self.weight


class Attention(nn.Module):
    """Causal grouped-query attention with a rotary embedding of positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.annotate_regions = config.annotate_regions
        kv_width = config.num_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, config.dim, bias=False)
        self.wk = nn.Linear(config.dim, kv_width, bias=False)
        self.wv = nn.Linear(config.dim, kv_width, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x_BSD: Tensor, cos_SE: Tensor, sin_SE: Tensor) -> Tensor:
        # -1 and not num_heads: under tensor parallelism each rank has its share of the heads
        q_BHSE = self.wq(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        k_BKSE = self.wk(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        v_BKSE = self.wv(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        with _region("attention", self.annotate_regions):
            q_BHSE, k_BKSE = rotate(q_BHSE, cos_SE, sin_SE), rotate(k_BKSE, cos_SE, sin_SE)
            y_BHSE = F.scaled_dot_product_attention(q_BHSE, k_BKSE, v_BKSE, is_causal=True, enable_gqa=True)
            y_BSD = y_BHSE.transpose(1, 2).flatten(-2)
        return self.wo(y_BSD)


class FeedForward(nn.Module):
    """SwiGLU: a gated feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.annotate_regions = config.annotate_regions
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        with _region("feed_forward", self.annotate_regions):
            return self.w2(F.silu(self.w1(x_BSD)) * self.w3(x_BSD))


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each on normed input and added to the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BSD: Tensor, cos_SE: Tensor, sin_SE: Tensor) -> Tensor:
        h_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos_SE, sin_SE)
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
        cos_SE, sin_SE = rotary_tables(config.max_seq_len, config.head_dim, config.rope_theta)
        self.register_buffer("cos_SE", cos_SE, persistent=False)
        self.register_buffer("sin_SE", sin_SE, persistent=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Logits (B, S, V) of the tokens (B, S)."""
        num_tokens = tokens_BS.shape[1]
        cos_SE, sin_SE = self.cos_SE[:num_tokens], self.sin_SE[:num_tokens]
        x_BSD = self.tok_embeddings(tokens_BS)
        for layer in self.layers:
            x_BSD = layer(x_BSD, cos_SE, sin_SE)
        logits_BSV: Tensor = self.output(self.norm(x_BSD))
        return logits_BSV

    @torch.no_grad()
    def init_weights(self, seed: int) -> Llama3:
        """Draw every weight from `seed` alone, whatever was drawn before: truncated normals, smaller in deeper blocks."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            deep = name.endswith(("wo.weight", "w2.weight"))
            std = 0.02 / (2 * self.config.num_layers) ** 0.5 if deep else 0.02
            nn.init.trunc_normal_(parameter, std=std, a=-3 * std, b=3 * std, generator=generator)
        return self


def rotary_tables(num_positions: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (S, E) of the angle by which each position turns each feature of a head.

    >>> [t.shape for t in rotary_tables(7, 4, 1e4)]
    [torch.Size([7, 4]), torch.Size([7, 4])]
    """
    frequency_E = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle_SE = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequency_E).repeat(1, 2)
    return angle_SE.cos(), angle_SE.sin()


def rotate(x_BHSE: Tensor, cos_SE: Tensor, sin_SE: Tensor) -> Tensor:
    """Turn the two halves of each head against each other by the angle of their position."""
    left, right = x_BHSE.chunk(2, dim=-1)
    turned_BHSE = torch.cat((-right, left), dim=-1)
    return (x_BHSE * cos_SE + turned_BHSE * sin_SE).to(x_BHSE.dtype)


def _region(name: str, wanted: bool) -> AbstractContextManager[Any]:
    if not wanted:
        return nullcontext()
    annotate = getattr(torch.fx.traceback, "annotate", None)
    if annotate is None:
        raise UnsupportedError(
            f"torch {torch.__version__} has no torch.fx.traceback.annotate (2.10 and later have it); "
            "activate torchspan, which provides it, or build the model with annotate_regions=False"
        )
    context: AbstractContextManager[Any] = annotate({"compile_with_inductor": name})
    return context


MODEL = ModelSpec(
    name="llama3",
    summary="Llama 3: RMSNorm, rotary embedding, grouped-query attention, SwiGLU",
    flavours=FLAVOURS,
    build=Llama3,
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
