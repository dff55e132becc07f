"""What a program returns without having made it, and what it asks without reading it: both are as they are at the call."""

from __future__ import annotations

import dataclasses
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchspan.artifacts import load, precompile
from torchspan.core.errors import GuardError, ManifestMismatchError, UnsupportedError

SETTINGS = types.ModuleType("artifact_settings")


ZERO = types.SimpleNamespace(scale=0.0)


class Wide:
    power = 2


class Returns(nn.Module):
    """Returns its own attributes beside what it computes."""

    factor = 3.0

    def __init__(self) -> None:
        super().__init__()
        self.label, self.scale, self.seen, self.weight = "a", 2.0, {"steps": 1}, nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"out": x * self.weight, "label": self.label, "more": [self.scale + 1, self.seen], "weight": self.weight}


@dataclasses.dataclass
class Found:
    first: Any = 3
    second: Any = None
    third: Any = dataclasses.field(default=None, init=False)


@dataclasses.dataclass
class Doubled:
    value: Any

    def __post_init__(self) -> None:
        self.value = self.value * 2


class Records(nn.Module):
    """Returns a record whose fields are not what its class has by default."""

    def forward(self, x: torch.Tensor) -> Found:
        return Found(first=None, second=x * 2)


class Converts(nn.Module):
    """Returns a record that is not what it was made from."""

    def forward(self, x: torch.Tensor) -> Doubled:
        return Doubled(x)


class Asks(nn.Module):
    """Asks for what may be absent."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * Wide.power
        if hasattr(SETTINGS, "offset") or hasattr(self, "extra"):
            x = x + 1
        try:
            x = x * self.gain
        except AttributeError:
            x = x * ZERO.scale
        return x * float(os.environ.get("ARTIFACT_TEST_SCALE", "2"))


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "artifact_settings", SETTINGS)


def test_what_a_program_returns_and_did_not_make_is_as_it_is_now(tmp_path: Path) -> None:
    model, x = Returns(), torch.ones(3)
    fast = load(precompile(model, (x,), compiler="eager").save(tmp_path / "r.tspan"), model)
    model.seen["steps"] = 5
    result = _result_or_guard(fast, x)
    if isinstance(result, dict):  # torch 2.8 has a guard on it
        assert result["more"][1] is model.seen
        assert result["weight"] is model.weight
    model.seen["steps"] = 1
    assert fast(x)["label"] == "a"
    model.label = "b"
    with pytest.raises(GuardError, match=r"target\.label is 'b', expected 'a'"):
        fast(x)
    model.label, model.scale = "a", 7.0
    with pytest.raises(GuardError, match=r"target\.scale is 7\.0, expected 2\.0"):
        fast(x)


def test_a_record_is_made_again_with_all_its_fields(tmp_path: Path) -> None:
    x = torch.ones(3)
    model = Records()
    result = load(precompile(model, (x,), compiler="eager").save(tmp_path / "d.tspan"), model)(x)
    assert type(result) is Found
    assert result.first is None
    assert torch.equal(result.second, x * 2)


def test_a_record_that_cannot_be_made_again_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="cannot make again what Converts returns"):
        precompile(Converts(), (torch.ones(3),), compiler="eager")


def _result_or_guard(fast: Callable[..., Any], x: torch.Tensor) -> Any:
    try:
        return fast(x)
    except GuardError as refused:
        return str(refused)


class Inherits(Returns):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def test_a_constant_of_a_base_class_is_guarded_where_a_subclass_may_have_it_too(tmp_path: Path) -> None:
    class Scaled(Inherits):
        pass

    model, x = Scaled(), torch.ones(3)
    path = precompile(model, (x,), compiler="eager").save(tmp_path / "c.tspan")
    fast = load(path, model)
    torch.testing.assert_close(fast(x), model(x))
    Scaled.factor = 5.0
    with pytest.raises(GuardError, match=r"factor|has 'factor'"):
        fast(x)


def test_a_forward_of_torch_that_was_replaced_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(3, 3)), torch.ones(3)
    path = precompile(model, (x,), compiler="eager").save(tmp_path / "l.tspan")
    fast = load(path, model)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x * 0)
    with pytest.raises(GuardError, match="Linear is not what it was when"):
        fast(x)
    with pytest.raises(ManifestMismatchError, match="entry 'code'"):
        load(path, model)


class Chooses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps, self.part = [1, 2], nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x) * len(self.steps) if self.part is not None else x


def test_what_became_something_of_another_kind_is_a_guard_that_does_not_hold(tmp_path: Path) -> None:
    model, x = Chooses(), torch.ones(3)
    artifact = precompile(model, (x,), compiler="eager")
    fast = load(artifact.save(tmp_path / "k.tspan"), model)
    torch.testing.assert_close(fast(x), model(x))
    part, model.steps = model.part, 5  # type: ignore[assignment]
    with pytest.raises(GuardError, match=r"target\.steps is a int and was something else"):
        fast(x)
    model.steps, model.part = [1, 2], None  # type: ignore[assignment]
    with pytest.raises(GuardError, match=r"part"):
        fast(x)
    model.part = part
    torch.testing.assert_close(fast(x), model(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model, patch: patch.setattr(SETTINGS, "offset", 1, raising=False), "has the attribute 'offset'"),
        (lambda model, patch: setattr(model, "extra", 1), "has the attribute 'extra'"),
        (lambda model, patch: setattr(model, "gain", 3), "has the attribute 'gain'"),
        (lambda model, patch: patch.setattr(ZERO, "scale", -0.0), r"scale is -0\.0, expected 0\.0"),
        (lambda model, patch: patch.setenv("ARTIFACT_TEST_SCALE", "5"), "has b'ARTIFACT_TEST_SCALE'"),
        (lambda model, patch: patch.setattr(Wide, "power", 5), r"Wide\.power is 5, expected 2"),
    ],
)
def test_what_a_program_asks_for_and_did_not_find_is_guarded(
    change: Callable[..., Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Asks(), torch.ones(3)
    fast = load(precompile(model, (x,), compiler="eager").save(tmp_path / "a.tspan"), model)
    torch.testing.assert_close(fast(x), model(x))
    change(model, monkeypatch)
    with pytest.raises(GuardError, match=message):
        fast(x)
