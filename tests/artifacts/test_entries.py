"""Artifacts with several entries, with weights inside, and what can be told of them without a model."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from torchspan.artifacts import describe, diff, load, precompile, verify
from torchspan.core.errors import GuardError, InputError
from torchspan.core.numerics import difference


def test_each_call_takes_the_entry_that_its_guards_are_for(models: types.ModuleType, tmp_path: Path) -> None:
    model = models.mlp()
    artifact = precompile(model, (torch.randn(4, 10),), compiler="eager")
    artifact.add(model, (torch.randn(7, 10),))
    artifact.add(model, (torch.randn(4, 10),), {"mask": torch.ones(5)})
    artifact.add(model.eval(), (torch.randn(4, 10),))
    loaded = load(artifact.save(tmp_path / "model.tspan"), model.train())
    calls: list[tuple[Any, dict[str, Any]]] = [((torch.randn(4, 10),), {}), ((torch.randn(7, 10),), {})]
    for args, kwargs in (*calls, (calls[0][0], {"mask": torch.ones(5)})):
        expected = models.loss_of(model(*args, **kwargs))
        assert torch.equal(models.loss_of(loaded(*args, **kwargs)), expected)
    model.eval()
    loaded(torch.randn(4, 10))
    with pytest.raises(GuardError, match=r"shape \[5, 10\] \(expected \[4, 10\]\); or .*\(expected \[7, 10\]\)"):
        loaded(torch.randn(5, 10))
    assert describe(tmp_path / "model.tspan")["entries"]["rebuild"].count("--inputs 'float32[") == 4


def test_gradients_flow_through_each_entry(models: types.ModuleType, tmp_path: Path) -> None:
    model, reference = models.mlp(), models.mlp()
    artifact = precompile(model, (torch.randn(4, 10),), compiler="eager")
    artifact.add(model, (torch.randn(2, 10),))
    loaded = load(artifact.save(tmp_path / "model.tspan"), model)
    for rows in (2, 4, 2):
        x = torch.randn(rows, 10)
        models.loss_of(loaded(x)).backward()
        models.loss_of(reference(x)).backward()
    for actual, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert difference(actual.grad, other.grad) is None


def test_another_model_cannot_be_added(models: types.ModuleType) -> None:
    artifact = precompile(models.mlp(), (torch.randn(4, 10),), compiler="eager")
    with pytest.raises(InputError, match="this one differs in: model, code, state"):
        artifact.add(models.cnn(), models.inputs("cnn")[0])
    assert len(artifact.programs) == 1


@pytest.mark.parametrize("name", ["cnn", "tied"])
def test_weights_are_inside_if_asked_for_and_given_on_request(name: str, models: types.ModuleType, tmp_path: Path) -> None:
    model, (args, kwargs) = getattr(models, name)(), models.inputs(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    path = precompile(model, args, kwargs, compiler="eager", weights=True).save(tmp_path / "model.tspan")
    fresh = getattr(models, name)()
    load(path, fresh)
    assert not torch.equal(next(fresh.parameters()), next(model.parameters()))
    load(path, fresh, weights=True)
    for actual, other in zip(fresh.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(actual, other)


def test_weights_that_are_not_inside_are_one_clear_error(models: types.ModuleType, make: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="the artifact has no weights inside; make it with precompile"):
        load(make("mlp"), models.mlp(), weights=True)
    with pytest.raises(InputError, match="a function has no weights"):
        precompile(models.dot, ([torch.ones(2), torch.ones(2)],), compiler="eager", weights=True)


def test_two_artifacts_are_compared_by_entry_and_payload(models: types.ModuleType, tmp_path: Path) -> None:
    model = models.mlp()
    first = precompile(model, (torch.randn(4, 10),), compiler="eager").save(tmp_path / "one.tspan")
    same = precompile(models.mlp(), (torch.randn(4, 10),), compiler="eager").save(tmp_path / "same.tspan")
    second = precompile(model, (torch.randn(5, 10),), compiler="eager").save(tmp_path / "other.tspan")
    assert diff(first, same) == {"entries": {}, "payloads": {}}
    result = diff(first, second)
    assert list(result["entries"]) == ["rebuild"]
    assert set(result["payloads"]) == {"entry0/plan.json", "entry0/guards.json"}
    assert verify(first)["differs"] == {}
