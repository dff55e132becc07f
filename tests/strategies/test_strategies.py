"""How each strategy cuts a program, and which is tried when."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from torchspan.core.errors import UnknownNameError
from torchspan.strategies._base import REGISTRY, cut
from torchspan.strategies._blocks import repeated_blocks
from torchspan.strategies._ladder import by_size, ladder_for


@pytest.mark.parametrize("name", REGISTRY.names())
def test_every_strategy_cuts_modules_and_functions_and_says_why(name: str, stack: Callable[..., nn.Module]) -> None:
    assert REGISTRY.get(name).SUMMARY
    for program in (stack(), abs):
        result = cut(name, program)
        assert result.reason
        for part in result.parts:
            assert part.name and part.targets
            assert part.is_block or part.targets == (program,)


def test_blocks_are_found_by_structure_whatever_they_are_called() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 4)
            self.one = nn.TransformerEncoderLayer(4, 2, 8)
            self.wide = nn.TransformerEncoderLayer(4, 2, 16)
            self.inside = nn.ModuleDict({"x": nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8), nn.Linear(4, 4))})

    model = Odd()
    assert [[id(block) for block in kind] for kind in repeated_blocks(model)] == [[id(model.one), id(model.inside["x"][0])]]


def test_the_outermost_repeated_modules_are_the_blocks(stack: Callable[..., nn.Module]) -> None:
    model = nn.ModuleList([stack(), stack()])
    (kind,) = repeated_blocks(model)
    assert [id(block) for block in kind] == [id(model[0]), id(model[1])]


def test_equal_linear_layers_are_no_blocks() -> None:
    assert repeated_blocks(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))) == []
    assert cut("per_block", nn.Linear(2, 2)).parts == ()


def test_the_default_ladder_goes_by_size() -> None:
    sizes = (1e6, 5e9, 2e10, 5e10)
    assert [by_size(int(size), has_budget=False).strategies[0] for size in sizes] == ["whole", "whole", "per_block", "eager"]
    assert by_size(int(5e10), has_budget=True).strategies[0] == "per_block"
    with torch.device("meta"):
        huge = nn.Linear(150_000, 150_000)
    assert ladder_for("auto", huge, has_budget=False).strategies == ("per_block", "eager")
    assert ladder_for("auto", abs, has_budget=False).strategies == ("whole", "eager")
    assert ladder_for("whole", huge, has_budget=False).strategies == ("whole", "eager")


def test_an_unknown_strategy_is_named() -> None:
    with pytest.raises(UnknownNameError, match="no strategy 'hole'; did you mean 'whole'"):
        cut("hole", abs)
