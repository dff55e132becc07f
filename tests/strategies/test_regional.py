"""Regions that the author of a model marks or names: these are compiled, and the rest runs eagerly."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torchspan
from torchspan.core.errors import InputError
from torchspan.strategies import report_of
from torchspan.strategies._base import Request, cut

Wait = Callable[..., None]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"  # torch 2.13, when inductor is imported
)


def doubles(graph: Any, inputs: Any) -> Any:
    """A backend whose results show where it was at work."""
    return lambda *args: tuple(2 * output for output in graph.forward(*args))


def linear() -> nn.Linear:
    return nn.Linear(2, 2, bias=False)


def parts(model: nn.Module, *regions: str) -> list[tuple[str, int]]:
    return [(part.name, len(part.targets)) for part in cut("regional", model, Request(regions=regions)).parts]


def test_marked_modules_are_compiled_once_a_kind_and_the_rest_is_eager(until: Wait) -> None:
    model = nn.Sequential(linear(), torchspan.region(linear()), nn.Tanh(), torchspan.region(linear())).eval()
    compiled, x = torchspan.compile(model, backend=doubles, verify="off"), torch.ones(1, 2)
    decisions = compiled.report.decisions
    assert [decision.choice for decision in decisions] == ["regional → eager", "regional"]
    assert [decision.reason for decision in decisions] == ["modules of it are marked as regions", "marked regions: Linear ×2"]
    with torch.no_grad():
        until(lambda: bool(compiled.report.attempts), lambda: compiled(x))
        torch.testing.assert_close(compiled(x), 2 * model[3](torch.tanh(2 * model[1](model[0](x)))))
    assert [(attempt.strategy, attempt.region) for attempt in compiled.report.attempts] == [("regional", "Linear ×2")]


def test_a_mark_is_kept_by_copies_and_pickles_and_is_no_part_of_the_state() -> None:
    model = nn.Sequential(linear(), torchspan.region(linear()))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert parts(other) == [("1", 1)]
        assert list(other.state_dict()) == ["0.weight", "1.weight"]


def test_named_modules_are_regions_and_a_list_of_modules_stands_for_those_in_it() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([linear(), linear()]), "head": nn.Sequential(linear(), nn.ReLU())})
    assert parts(model, "layers") == parts(model, "layers.*") == [("Linear ×2", 2)]
    assert parts(model, "head", "layers.1") == [("layers.1", 1), ("head", 1)]
    assert parts(model, "*") == [("Linear ×2", 2), ("head", 1)]
    compiled = torchspan.compile(model, regions=["head"])
    assert [decision.choice for decision in report_of(compiled).decisions] == ["regional → eager", "regional"]


def test_of_regions_inside_regions_the_outermost_counts_and_a_mark_on_the_model_does_not() -> None:
    inner = torchspan.region(nn.Sequential(torchspan.region(linear()), nn.ReLU()))
    assert parts(torchspan.region(nn.Sequential(inner, linear()))) == [("0", 1)]
    assert torchspan.compile(inner[0]).report.decisions[0].choice == "whole → per_block → eager"


def test_a_module_that_is_used_twice_is_one_region() -> None:
    shared = torchspan.region(linear())
    assert parts(nn.Sequential(shared, nn.ReLU(), shared)) == [("0", 1)]


def test_without_regions_the_next_strategy_is_tried_and_the_report_says_how_to_mark() -> None:
    for program in (nn.Sequential(linear()), abs):
        compiled = torchspan.compile(program, strategy="regional")
        assert [decision.choice for decision in report_of(compiled).decisions] == ["regional → eager", "not regional", "eager"]
    assert "no module is marked with torchspan.region" in cut("regional", linear()).reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"regions": ["hed"]}, "regions has 'hed', but ModuleDict has no module of that name; did you mean 'head'"),
        ({"regions": ["stem.*"]}, "regions has 'stem.*', but ModuleDict has no module of that name; it has head"),
        ({"regions": "head"}, "regions is 'head'; expected names of modules, such as"),
        ({"regions": [3]}, "regions is .3.; expected names of modules"),
        ({"regions": ["head"], "strategy": "whole"}, "regions is for strategy='regional', not for 'whole'"),
        ({"regions": ["head"], "max_layers": 1}, "regions is for strategy='regional', not for 'per_block'"),
    ],
)
def test_regions_that_are_not_there_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        torchspan.compile(nn.ModuleDict({"head": linear()}), **arguments)


def test_only_a_module_can_be_marked() -> None:
    with pytest.raises(InputError, match="a region is a module, not builtin_function_or_method"):
        torchspan.region(abs)  # type: ignore[type-var]
