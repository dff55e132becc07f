"""A model's weights inside an artifact: safetensors, one copy of what is tied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors

from torchspan.core.errors import InputError

WEIGHTS = "weights.safetensors"


def write_weights(model: Callable[..., Any]) -> bytes:
    """The parameters and buffers of `model` as safetensors.

    Raises:
        InputError: a function, which has none.
    """
    if not isinstance(model, torch.nn.Module):
        raise InputError("weights=True is for a module; a function has no weights")
    return write_tensors({names[0]: tensor.detach().contiguous() for names, tensor in _named(model)})


def read_weights(payloads: Mapping[str, bytes], model: Callable[..., Any]) -> None:
    """Copy an artifact's weights into `model`.

    Raises:
        InputError: there are none inside, or `model` is a function.
    """
    if WEIGHTS not in payloads:
        raise InputError(
            "the artifact has no weights inside; make it with precompile(..., weights=True), or load(weights=False)"
        )
    if not isinstance(model, torch.nn.Module):
        raise InputError("weights=True is for a module; a function has no weights")
    inside = read_tensors(payloads[WEIGHTS])
    with torch.no_grad():
        for names, tensor in _named(model):
            tensor.copy_(inside[names[0]])


def _named(model: torch.nn.Module) -> list[tuple[list[str], torch.Tensor]]:
    """Every parameter and buffer once, with all its names."""
    entries: dict[int, tuple[list[str], torch.Tensor]] = {}
    pairs = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in pairs:
        entries.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(entries.values())
