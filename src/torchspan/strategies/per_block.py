"""Each repeated block is a region, and one compile serves all that are equal: compile time does not grow with depth.

Blocks are found by structure, not by name: modules of the same class whose parameters and buffers have the same names, shapes
and dtypes, and which hold other modules. What lies outside the blocks (embedding, head) runs eagerly, and so do the blocks that
a Request leaves out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from torchspan.core.errors import InputError
from torchspan.regions.part import Part
from torchspan.strategies._base import Cut, Request, count_of
from torchspan.strategies._blocks import blocks_of, kinds_of

SUMMARY = "each repeated block as a region; one compile serves all equal blocks"


def cut(program: Callable[..., Any], request: Request) -> Cut:
    """One part for each kind of block, of the blocks that `request` chooses; raises InputError for one that is not there."""
    if not isinstance(program, nn.Module):
        return Cut((), "a function has no blocks")
    blocks = blocks_of(program)
    if not blocks:
        return Cut((), f"{type(program).__name__} has no repeated blocks (two modules of the same structure, with submodules)")
    chosen = choose(blocks, request)
    parts = tuple(
        Part(f"{type(kind[0]).__name__} ×{len(kind)}", tuple(kind), is_block=True)
        for kind in kinds_of([blocks[i] for i in chosen])
    )
    names = ", ".join(part.name for part in parts)
    if len(chosen) == len(blocks):
        return Cut(parts, f"repeated blocks: {names}")
    return Cut(parts, f"{count_of(len(chosen), 'block')} of {len(blocks)} asked for ({_spans(chosen)}): {names}")


def choose(blocks: list[nn.Module], request: Request) -> list[int]:
    """The numbers of the blocks that `request` chooses, each once, in the order of the model.

    >>> choose([nn.Identity() for _ in range(4)], Request(layer_indices=(-1, 2, 0), max_layers=2))
    [0, 2]
    """
    num = len(blocks)
    indices = range(num) if request.layer_indices is None else request.layer_indices
    wrong_indices = [index for index in indices if not -num <= index < num]
    if wrong_indices:
        raise InputError(
            f"layer_indices has {', '.join(map(str, wrong_indices))}, but there are {count_of(num, 'block')}: "
            f"expected 0 to {num - 1} (or -{num} to -1, from the end)"
        )
    return sorted({index % num for index in indices})[: request.max_layers]


def _spans(numbers: list[int]) -> str:
    """Ascending numbers, as people write them.

    >>> _spans([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)
