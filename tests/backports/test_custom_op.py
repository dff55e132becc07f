"""custom_op takes one Tag as it takes several; a tag that this torch lacks is left out or refused, and said."""

from __future__ import annotations

import pytest
import torch

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.core.errors import UnsupportedError
from torchspan.environment.scope import Environment

BACKPORT = REGISTRY.get("custom_op").BACKPORT


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def fill_(x: torch.Tensor) -> torch.Tensor:
    x.fill_(1)
    return x


double.__annotations__ = fill_.__annotations__ = {"x": torch.Tensor, "return": torch.Tensor}


def test_one_tag_and_several_are_the_operators(environment: Environment) -> None:
    single = torch.library.custom_op("torchspan_test::one", double, mutates_args=(), tags=torch.Tag.pointwise)
    several = torch.library.custom_op("torchspan_test::several", mutates_args=(), tags=[torch.Tag.pointwise])(double)
    for operator in (single, several):
        assert torch.Tag.pointwise in operator._opoverload.tags
        assert torch.equal(operator(torch.ones(2)), torch.full((2,), 2.0))


def test_a_tag_that_only_informs_is_left_out(environment: Environment) -> None:
    operator = torch.library.custom_op("torchspan_test::reduced", double, mutates_args=(), tags=(torch.Tag.reduction,))
    assert torch.equal(operator(torch.ones(2)), torch.full((2,), 2.0))
    is_known = isinstance(torch.Tag.reduction, torch.Tag)  # torch 2.10 has it, and lacks others
    assert (torch.Tag.reduction in operator._opoverload.tags) == is_known
    choices = [decision.choice for decision in environment.report.decisions]
    assert ("without the tag" in choices) != is_known


def test_an_operator_in_place_works_or_says_why_not(environment: Environment) -> None:
    operator = torch.library.custom_op("torchspan_test::fill_", fill_, mutates_args={"x"}, tags=torch.Tag.inplace)
    x = torch.zeros(2)
    if not is_lacking(BACKPORT):
        assert operator(x) is x
        return
    with pytest.raises(
        UnsupportedError, match=r"custom operator torchspan_test::fill_: torch.Tag.inplace says that .* 2\.13\.0"
    ):
        operator(x)
