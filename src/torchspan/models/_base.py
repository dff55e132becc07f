"""What a model file says of itself: its flavours, how it is built, and how its parts shard under tensor parallelism."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchspan.core.errors import UnsupportedError, unknown_name
from torchspan.core.registry import Registry
from torchspan.models._hf import HFWeight, from_hf, to_hf

REGISTRY = Registry("torchspan.models", "model")

ShardStyle = Literal["embedding", "column", "row", "sequence", "gather_sequence", "logits", "tokens", "replicate", "to_local"]
"""How a submodule shards on the tensor-parallel axis.

``embedding``: by rows of the table, result split along the sequence. ``column``: by output features. ``row``: by input
features, partial results summed and split along the sequence. ``sequence``: weight on every rank, activations split along the
sequence. ``gather_sequence``: its input, split along the sequence, is gathered. ``logits``: by output features from an
activation split along the sequence, result gathered. ``tokens``: weight on every rank, tokens (N, D) split along dimension 0.
``replicate``: weight, input and result on every rank. ``to_local``: its first argument, which is on every rank, becomes a plain
tensor, to which each rank gives the gradient of its own heads.
"""


@dataclass(frozen=True)
class ModelSpec:
    """One model: `flavours` are configurations by name, `build` makes the module of one.

    `tensor_parallel` maps patterns of submodule names (``layers.*.attention.wq``) to how they shard, `expert_parallel` to what
    expert parallelism does to them (``torchspan.parallel.expert_parallel.ExpertStyle``). `sizes` says which numbers
    of a configuration the tensor-parallel degree must divide, by their names in it.
    A pattern that ends with ``?`` is for parts that only some flavours have. `hf_weights` lists the tensors of a
    configuration with their names in public checkpoints. `hf_ignored` is a regular expression for what a checkpoint may have
    and the model has no use for.
    """

    name: str
    summary: str
    flavours: Mapping[str, Any]
    build: Callable[[Any], nn.Module]
    tensor_parallel: Mapping[str, ShardStyle] = field(default_factory=dict)
    sizes: tuple[str, ...] = ()
    expert_parallel: Mapping[str, str] = field(default_factory=dict)
    hf_weights: Callable[[Any], list[HFWeight]] | None = None
    hf_ignored: Callable[[Any], str] | None = None

    def flavour(self, name: str) -> Any:
        """The configuration called `name`; UnknownNameError where there is none."""
        if name not in self.flavours:
            raise unknown_name(f"config of {self.name}", name, self.flavours, f"there are: {', '.join(self.flavours)}")
        return self.flavours[name]

    def to_hf(self, config: Any, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of a model of `config` in the names and layouts of Hugging Face's public checkpoints.

        Tensors of one layout are shared, not copied; save them with ``safetensors.torch.save_file``. A tensor that is missing,
        extra or of another shape is an InputError; a model without such names is an UnsupportedError.

        >>> spec = get_model("llama3")
        >>> tiny = spec.flavour("tiny")
        >>> checkpoint = spec.to_hf(tiny, spec.build(tiny).state_dict())
        >>> checkpoint["model.layers.1.self_attn.k_proj.weight"].shape
        torch.Size([16, 32])
        """
        return to_hf(self._hf_weights(config), self._expected(config), state_dict)

    def from_hf(self, config: Any, checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `to_hf`: what ``load_state_dict`` of a model of `config` takes; the same errors."""
        weights, ignored = self._hf_weights(config), self.hf_ignored and re.compile(self.hf_ignored(config))
        kept = {name: tensor for name, tensor in checkpoint.items() if not (ignored and ignored.fullmatch(name))}
        return from_hf(weights, self._expected(config), kept)

    def _hf_weights(self, config: Any) -> list[HFWeight]:
        if self.hf_weights is None:
            raise UnsupportedError(f"{self.name} has no names in public checkpoints; give its ModelSpec hf_weights")
        return self.hf_weights(config)

    def _expected(self, config: Any) -> dict[str, Tensor]:
        """The state dict of a model of `config`, without memory."""
        with torch.device("meta"):
            return self.build(config).state_dict()


def get_model(name: str) -> ModelSpec:
    """The model called `name`.

    >>> get_model("llama3").flavour("debugmodel").dim
    256
    >>> get_model("lama3")
    Traceback (most recent call last):
    torchspan.core.errors.UnknownNameError: no model 'lama3'; did you mean 'llama3'? there are: deepseek_v3, llama3
    """
    spec: ModelSpec = REGISTRY.get(name).MODEL
    return spec
