"""A registry: files of a folder and entry points are its plug-ins, none is imported before it is used."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from torchspan.core import registry as machinery
from torchspan.core.errors import InputError, UnknownNameError
from torchspan.core.registry import Registry

pytestmark = pytest.mark.once
FOLDERS = {"backports": "backport", "devices": "device rule", "passes": "pass", "strategies": "strategy", "models": "model"}


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> list[EntryPoint]:
    """Entry points as if installed packages had them."""
    points: list[EntryPoint] = []
    monkeypatch.setattr(machinery, "_entry_points", lambda: EntryPoints(points))
    return points


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_plug_in_has_a_summary_of_one_line(folder: str) -> None:
    registry = Registry(f"torchspan.{folder}", FOLDERS[folder])
    assert registry.names()
    for name in registry.names():
        assert not name.startswith("_")
        assert 10 < len(registry.docstring(name).partition("\n")[0]) <= 128, name


def test_names_and_summaries_import_no_plug_in() -> None:
    registry = Registry("torchspan.devices", "device rule")
    sys.modules.pop("torchspan.devices.scripting", None)
    assert registry.docstring("scripting").startswith("TorchScript")
    assert "torchspan.devices.scripting" not in sys.modules


def test_a_plug_in_of_another_package_is_found_and_a_name_taken_twice_names_both(offered: list[EntryPoint]) -> None:
    offered.append(EntryPoint("bisecting", "bisect", "torchspan.passes"))
    assert Registry("torchspan.passes", "pass").get("bisecting").__name__ == "bisect"
    offered.append(EntryPoint("remove_noops", "other.place", "torchspan.passes"))
    with pytest.raises(InputError, match=r"two plug-ins want the name 'remove_noops' .*passes\.remove_noops and other"):
        Registry("torchspan.passes", "pass").names()


def test_an_unknown_name_says_what_was_meant() -> None:
    with pytest.raises(UnknownNameError, match=r"no strategy 'wole'; did you mean 'whole'\? there are: eager, nested"):
        Registry("torchspan.strategies", "strategy").get("wole")
