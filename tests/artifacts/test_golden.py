"""Artifacts that were made once, of each version of the format, are read, or refused with the right words."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from torchspan.artifacts import describe, load, verify
from torchspan.core.errors import ManifestMismatchError

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
KEY = b"the secret of golden artifacts"


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(GOLDEN))
    import golden_model  # type: ignore[import-not-found]

    yield golden_model.build
    del sys.modules["golden_model"]


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.tspan")), ids=lambda path: path.stem)
def test_a_golden_artifact_is_whole_and_loads_or_is_refused_for_what_is_not_here(path: Path, build: Any) -> None:
    found = describe(path)
    assert found["entries"]["model"] == "golden_model:Golden" and len(found["programs"]) == 2
    assert verify(path, [KEY])["signed_by"] == found["signed_by"]
    model, differ = build(), verify(path)["differs"]
    if differ:
        with pytest.raises(ManifestMismatchError, match="Rebuild it: torchspan precompile ") as refused:
            load(path, model)
        assert all(f"entry {name!r}: {how}" in str(refused.value) for name, how in differ.items())
        return
    loaded = load(path, model, trusted_keys=[KEY], weights=True)
    for rows in (2, 5):
        x = torch.randn(rows, 3)
        assert torch.allclose(loaded(x), model(x))
