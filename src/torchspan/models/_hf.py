"""Names and layouts of Hugging Face's public checkpoints, to ours and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchspan.core.errors import InputError


@dataclass(frozen=True)
class HFWeight:
    """One of our tensors, `name`, and what public checkpoints call it: one name in `hf_names`, which then has the same layout.

    Two of ours that are one parameter have the same name in `hf_names`.

    `stacked`: ours is the stack of all of `hf_names` (one for each expert), each of them transposed: a checkpoint has weights
    as ``nn.Linear`` has, output features first; ours are input features first.
    """

    name: str
    hf_names: tuple[str, ...]
    stacked: bool = False


def to_hf(weights: Iterable[HFWeight], expected: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state_dict`, in our names, in those of a public checkpoint; stacked tensors are copied, others are shared.

    `expected` gives the shape of each of our tensors; InputError for one that is missing, extra, or of another shape.
    """
    weights = list(weights)
    _check_names(state_dict, {weight.name for weight in weights}, "the model's state dict")
    checkpoint: dict[str, Tensor] = {}
    for weight in weights:
        tensor = state_dict[weight.name]
        _check_shape(weight.name, tensor, expected[weight.name].shape)
        parts = [part.t().contiguous() for part in tensor] if weight.stacked else [tensor]
        checkpoint |= dict(zip(weight.hf_names, parts))
    return checkpoint


def from_hf(weights: Iterable[HFWeight], expected: Mapping[str, Tensor], checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`checkpoint`, in the names of a public checkpoint, in ours; the inverse of `to_hf`, with the same errors."""
    weights = list(weights)
    _check_names(checkpoint, {name for weight in weights for name in weight.hf_names}, "the checkpoint")
    state_dict: dict[str, Tensor] = {}
    for weight in weights:
        shape = expected[weight.name].shape
        part_shape = torch.Size((shape[2], shape[1])) if weight.stacked else shape
        for name in weight.hf_names:
            _check_shape(name, checkpoint[name], part_shape)
        parts = [checkpoint[name] for name in weight.hf_names]
        state_dict[weight.name] = torch.stack([part.t() for part in parts]) if weight.stacked else parts[0]
    return state_dict


def _check_names(names: Iterable[str], expected: set[str], owner: str) -> None:
    missing, extra = sorted(expected - set(names)), sorted(set(names) - expected)
    if missing:
        raise InputError(
            f"{owner} lacks {_listed(missing)}; expected {len(expected)} tensors. Is it whole, and of this configuration?"
        )
    if extra:
        raise InputError(
            f"{owner} has {_listed(extra)}, which this configuration has no place for; "
            "take the configuration that it was made for, or leave these out"
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _check_shape(name: str, tensor: Tensor, expected: torch.Size) -> None:
    if tensor.shape != expected:
        raise InputError(
            f"{name} has the shape {tuple(tensor.shape)}; this configuration expects {tuple(expected)}. "
            "Take the configuration that the weights were made for"
        )
