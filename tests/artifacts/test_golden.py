"""Artifacts that were made once, of each version of the format, are read, or refused with the right words."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from torchspan.artifacts import describe, load, verify
from torchspan.core.errors import ManifestMismatchError

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
KEY = b"the secret of golden artifacts"


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Makes a golden model, by its name."""
    monkeypatch.syspath_prepend(str(GOLDEN))
    names = ("golden_model", "golden_storing")

    def build_model(name: str) -> Any:
        return importlib.import_module(name).build()

    yield build_model
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.tspan")), ids=lambda path: path.stem)
def test_a_golden_artifact_is_whole_and_loads_or_is_refused_for_what_is_not_here(path: Path, build: Any) -> None:
    actual = describe(path)
    assert actual["entries"]["format"] == int(path.name.removeprefix("format")[0]) and len(actual["programs"]) == 2
    assert verify(path, [KEY])["signed_by"] == actual["signed_by"]
    name = actual["entries"]["model"].partition(":")[0]
    model, expected, differ = build(name), build(name), verify(path)["differs"]
    if differ:
        with pytest.raises(ManifestMismatchError, match="Rebuild it: torchspan precompile ") as refused:
            load(path, model)
        assert all(f"entry {name!r}: {how}" in str(refused.value) for name, how in differ.items())
        return
    loaded = load(path, model, trusted_keys=[KEY], weights=True)
    for rows in (2, 5):
        x = torch.randn(rows, 3)
        assert torch.allclose(loaded(x), expected(x))
        assert all(map(torch.equal, model.buffers(), expected.buffers()))
