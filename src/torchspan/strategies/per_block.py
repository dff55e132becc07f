"""Each repeated block is a region, and one compile serves all that are equal: compile time does not grow with depth.

Blocks are found by structure, not by name: modules of the same class whose parameters and buffers have the same names, shapes
and dtypes, and which hold other modules. What lies outside the blocks (embedding, head) runs eagerly.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

from torch import nn

from torchspan.strategies._base import Cut, Part

SUMMARY = "each repeated block as a region; one compile serves all equal blocks"


def cut(program: Callable[..., Any]) -> Cut:
    """One part for each kind of repeated block."""
    if not isinstance(program, nn.Module):
        return Cut((), "a function has no blocks")
    kinds = repeated_blocks(program)
    if not kinds:
        return Cut((), f"{type(program).__name__} has no two modules of the same structure that hold others")
    parts = tuple(Part(f"{type(blocks[0]).__name__} ×{len(blocks)}", tuple(blocks), is_block=True) for blocks in kinds)
    return Cut(parts, f"repeated blocks: {', '.join(part.name for part in parts)}")


def repeated_blocks(model: nn.Module) -> list[list[nn.Module]]:
    """The outermost modules that occur at least twice with the same structure, by kind, in the order of the model.

    >>> block = lambda width: nn.TransformerEncoderLayer(width, 2, 8)
    >>> [len(kind) for kind in repeated_blocks(nn.Sequential(nn.Linear(4, 4), block(4), block(4), block(8)))]
    [2]
    """
    seen: dict[Hashable, int] = {}
    for module in model.modules():
        if module is not model and _may_be_block(module):
            seen[_structure(module)] = seen.get(_structure(module), 0) + 1
    kinds: dict[Hashable, list[nn.Module]] = {}
    for module in _outermost(model, seen):
        blocks = kinds.setdefault(_structure(module), [])
        if not any(module is known for known in blocks):
            blocks.append(module)
    return [blocks for blocks in kinds.values() if len(blocks) > 1]


def _outermost(module: nn.Module, seen: dict[Hashable, int]) -> Iterator[nn.Module]:
    for child in module.children():
        if _may_be_block(child) and seen[_structure(child)] > 1:
            yield child
        else:
            yield from _outermost(child, seen)


def _may_be_block(module: nn.Module) -> bool:
    """Whether it computes (a container of modules does not) and holds more than one operation's weights."""
    is_container = isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict))
    return not is_container and any(True for _ in module.children()) and any(True for _ in module.parameters())


def _structure(module: nn.Module) -> Hashable:
    tensors = (*module.named_parameters(), *module.named_buffers())
    return type(module), tuple((name, tuple(one.shape), one.dtype, one.device) for name, one in tensors)
