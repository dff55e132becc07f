"""What a file can reach whose every digest is right: its plan, guards and sizes are written by hand, without a signature."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchspan.artifacts import load
from torchspan.artifacts.container import Store, write_artifact
from torchspan.artifacts.manifest import values_of, write_manifest
from torchspan.core.errors import ArtifactError, IntegrityError, TorchspanError, UnsupportedError

pytestmark = pytest.mark.once


@pytest.fixture
def forge(make: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """An artifact of the model ``modes`` with another plan or other guards, and every digest right."""

    def forged(plan: Any = None, guards: Any = None, entries: Any = None) -> Path:
        with Store(make("modes")) as store:
            payloads, manifest = store.payloads(), store.manifest
        for name, change in (("plan", plan), ("guards", guards)):
            content = json.loads(payloads[f"entry0/{name}.json"])
            content.update(change(content) if change else {})
            payloads[f"entry0/{name}.json"] = json.dumps(content).encode()
        target = tmp_path / "forged.tspan"
        changed = {**values_of(manifest), **(entries or {})}
        write_artifact(target, write_manifest(changed, payloads, manifest["programs"]), payloads)
        return target

    return forged


@pytest.mark.parametrize(
    "result",
    [
        {"call": "subprocess:Popen", "args": [{"constant": ["touch", "forged-was-here"]}], "kwargs": []},
        {"call": "io:FileIO", "args": [{"constant": "forged-was-here"}, {"constant": "w"}], "kwargs": []},
        {"call": "ctypes:CDLL", "args": [{"constant": "./forged.so"}], "kwargs": []},
        {"call": "os:system", "args": [{"constant": "touch forged-was-here"}], "kwargs": []},
        {"path": [["module", "ctypes"], ["attr", "cdll"], ["attr", "./forged.so"]]},
        {"constant": {"enum": ["os:path", "sep"]}},
    ],
)
def test_a_result_that_would_be_made_by_running_something_is_refused(
    result: Any, forge: Callable[..., Path], models: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError):
        load(forge(plan=lambda plan: {"result": result}), models.modes())
    assert not (tmp_path / "forged-was-here").exists()


def test_no_library_is_opened_by_a_key(forge: Callable[..., Path], models: types.ModuleType) -> None:
    result = {"path": [["module", "ctypes"], ["attr", "cdll"], ["item", "./forged.so"]]}
    with pytest.raises(TypeError, match="LibraryLoader"):
        load(forge(plan=lambda plan: {"result": result}), models.modes())(*models.inputs("modes")[0])


@pytest.mark.parametrize("name", ["aten.set_grad_enabled.default", "aten.manual_seed.default", "aten.save.default"])
def test_an_operator_that_is_no_computation_cannot_be_named(
    name: str, forge: Callable[..., Path], models: types.ModuleType
) -> None:
    def change(plan: Any) -> Any:
        step = {"operator": name, "args": [False], "kwargs": {}}
        return {"forward": {**plan["forward"], "steps": [*plan["forward"]["steps"], step]}}

    with pytest.raises(UnsupportedError, match=f"this torch has no operator {name}"):
        load(forge(plan=change), models.modes())


@pytest.mark.parametrize(
    "text",
    ["(((9**16)**16)**16)**16 > 0", "round(s0, -10**9) > 0", "round(s0, 10**9) > 0", "+".join(["s0"] * 70000), f"{9**99}"],
)
def test_an_expression_that_takes_hours_is_refused(text: str, forge: Callable[..., Path], models: types.ModuleType) -> None:
    sizes = {"variables": {"s0": [["local", "args"], ["item", 0], ["size", 0]]}, "conditions": [text]}
    with pytest.raises(IntegrityError, match="which is not one over sizes"):
        load(forge(guards=lambda guards: {"sizes": sizes}), models.modes())


@pytest.mark.parametrize("value", [{}, {"capability": "AVX2"}, {"capability": [], "flags": 5}, [], None])
def test_an_entry_that_is_not_as_it_is_written_is_one_clear_error(
    value: Any, forge: Callable[..., Path], models: types.ModuleType
) -> None:
    with pytest.raises(TorchspanError):
        load(forge(entries={"isa": value}), models.modes())
