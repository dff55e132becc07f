"""The three ways into :func:`torchspan.compile` that have names of their own: whole, in part, and by size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from torchspan.core.errors import InputError
from torchspan.core.program import program_name
from torchspan.strategies._blocks import blocks_of
from torchspan.strategies._compile import compile_bounded
from torchspan.strategies._ladder import BILLION

Program = TypeVar("Program", bound=Callable[..., Any])


def safe_compile(model: Program, **arguments: Any) -> Program:
    """`model` (a module or a function), compiled as a whole inside a budget; its blocks if that fails, else nothing.

    :func:`torchspan.compile` with ``strategy=("whole", "per_block")``, whatever the model's size; `arguments` are its own
    (`budget`, `wait`, `verify`, …) and torch.compile's (`mode`, `fullgraph`, `dynamic`, `backend`, `options`). Nothing that the
    compiler does is raised or waited for: ``report`` has it.

    >>> compiled = safe_compile(torch.nn.Linear(2, 2))
    >>> compiled.report.decisions[0].choice
    'whole → per_block → eager'
    """
    return compile_bounded(model, strategy=("whole", "per_block"), **arguments)


def partial_compile(
    model: Program,
    *,
    layer_indices: Sequence[int] | None = None,
    max_layers: int | None = None,
    strict: bool = False,
    **arguments: Any,
) -> Program:
    """`model`, of which only repeated blocks are compiled: all, those of `layer_indices`, or the first `max_layers` of them.

    Blocks are numbered as the model holds them, from 0, or from the end with negative numbers. One compile serves all that are
    equal, so that few blocks compile no faster than many; a kind that fails runs eagerly, alone, and one that hangs takes its
    share of the `budget` only (``Budget(20, region_seconds=5)``; by default an equal one). A model without blocks is
    compiled as a whole below 10 billion parameters and runs eagerly above, with a Decision that says so; with `strict` it is an
    InputError, as a number that no block has always is. `arguments` are those of :func:`torchspan.compile`.

    >>> encoder = torch.nn.Sequential(*(torch.nn.TransformerEncoderLayer(4, 2, 8) for _ in range(6)))
    >>> partial_compile(encoder, max_layers=2).report.decisions[-1].reason
    '2 blocks of 6 asked for (0-1): TransformerEncoderLayer ×2'
    >>> partial_compile(encoder, layer_indices=[7])
    Traceback (most recent call last):
    torchspan.core.errors.InputError: layer_indices has 7, but there are 6 blocks: expected 0 to 5 (or -6 to -1, from the end)
    """
    strategy = ["per_block"]
    if not _has_blocks(model):
        if strict:
            raise InputError(
                f"{program_name(model)} has no repeated blocks (two modules of the same structure that hold others), which "
                "partial_compile(strict=True) needs; smart_compile chooses by size, safe_compile compiles the whole"
            )
        strategy += ["whole"] if _num_parameters(model) < 10 * BILLION else []
    return compile_bounded(model, strategy=strategy, layer_indices=layer_indices, max_layers=max_layers, **arguments)


def smart_compile(model: Program, **arguments: Any) -> Program:
    """`model`, compiled by the strategy that its size calls for, unless something else was measured on an equal one.

    By default: below 1 billion parameters the whole model; from 1 to 10 billion the whole model within a part of the budget,
    then its blocks; from 10 to 40 billion its repeated blocks; above 40 billion nothing, or its blocks if a budget is given.
    Measurement overrules it: a strategy that ended in a timeout, out of memory or in a crash for an equal model in this
    process, within a budget no smaller, is left out, and one that compiled is tried where the size alone would not have it.
    The first Decision of ``report`` says what was chosen, and whether by size or by measurement. `arguments` are those of
    :func:`torchspan.compile`, whose default this is.

    >>> with torch.device("meta"):
    ...     huge = torch.nn.Linear(250_000, 250_000)
    >>> smart_compile(huge).report.decisions[0].reason
    '62.5 billion parameters: above 40 billion nothing is compiled unless a budget is given'
    """
    return compile_bounded(model, strategy="auto", **arguments)


def _has_blocks(model: Callable[..., Any]) -> bool:
    return isinstance(model, torch.nn.Module) and bool(blocks_of(model))


def _num_parameters(model: Callable[..., Any]) -> int:
    return sum(parameter.numel() for parameter in model.parameters()) if isinstance(model, torch.nn.Module) else 0
