"""What a model file says of itself: its flavours, how it is built, and how its parts shard under tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from torchspan.core.errors import unknown_name
from torchspan.core.registry import Registry

REGISTRY = Registry("torchspan.models", "model")

ShardStyle = Literal["embedding", "column", "row", "sequence", "gather_sequence", "logits"]
"""How a submodule shards on the tensor-parallel axis.

``embedding``: by rows of the table, result split along the sequence. ``column``: by output features. ``row``: by input
features, partial results summed and split along the sequence. ``sequence``: weight on every rank, activations split along the
sequence. ``gather_sequence``: its input, split along the sequence, is gathered. ``logits``: by output features from an
activation split along the sequence, result gathered.
"""


@dataclass(frozen=True)
class ModelSpec:
    """One model: `flavours` are configurations by name, `build` makes the module of one.

    `tensor_parallel` maps patterns of submodule names (``layers.*.attention.wq``) to how they shard. `sizes` says which numbers
    of a configuration the tensor-parallel degree must divide, by their names in it.
    """

    name: str
    summary: str
    flavours: Mapping[str, Any]
    build: Callable[[Any], nn.Module]
    tensor_parallel: Mapping[str, ShardStyle] = field(default_factory=dict)
    sizes: tuple[str, ...] = ()

    def flavour(self, name: str) -> Any:
        """The configuration called `name`; UnknownNameError where there is none."""
        if name not in self.flavours:
            raise unknown_name(f"config of {self.name}", name, self.flavours, f"there are: {', '.join(self.flavours)}")
        return self.flavours[name]


def get_model(name: str) -> ModelSpec:
    """The model called `name`.

    >>> get_model("llama3").flavour("debugmodel").dim
    256
    >>> get_model("lama3")
    Traceback (most recent call last):
    torchspan.core.errors.UnknownNameError: no model 'lama3'; did you mean 'llama3'? there are: llama3
    """
    spec: ModelSpec = REGISTRY.get(name).MODEL
    return spec
