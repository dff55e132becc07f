"""The whole program is one region, and each repeated block in it a nested one, which torch compiles once and calls often."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import __version__, nn
from torch.nn.parallel import DistributedDataParallel

from torchspan.core.program import program_name
from torchspan.regions.nested_class import is_available
from torchspan.regions.part import Part
from torchspan.strategies._base import Cut, Request, count_of
from torchspan.strategies._blocks import blocks_of

SUMMARY = "the whole program as one region, its repeated blocks as nested regions that torch compiles once"


def cut(program: Callable[..., Any], request: Request) -> Cut:
    """One part: the program, with its blocks as nested regions; none without such regions in torch or without blocks."""
    if not is_available():
        return Cut((), f"torch {__version__} has no torch.compiler.nested_compile_region; per_block needs none")
    if not isinstance(program, nn.Module):
        return Cut((), "a function has no blocks")
    if isinstance(program, DistributedDataParallel):
        return Cut((), "of a module in DistributedDataParallel, whole is the strategy")
    blocks = [block for block in blocks_of(program) if "forward" not in vars(block)]
    if not blocks:
        return Cut((), f"{program_name(program)} has no repeated blocks (two modules of the same structure, with submodules)")
    classes = tuple(dict.fromkeys(type(block) for block in blocks))
    reason = f"one region, with {count_of(len(blocks), 'nested region')}"
    return Cut((Part(program_name(program), (program,), nested=classes),), reason)
