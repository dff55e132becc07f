"""``torchspan.__all__`` is what torchspan has, and each name says what it is."""

from __future__ import annotations

import inspect

import pytest

import torchspan


def test_all_names_exist_and_are_documented() -> None:
    assert list(torchspan.__all__) == sorted(torchspan.__all__)
    for name in torchspan.__all__:
        value = getattr(torchspan, name)
        assert name == "__version__" or inspect.getdoc(value), f"{name} has no docstring"


def test_all_is_what_dir_shows() -> None:
    public = {name for name in dir(torchspan) if not name.startswith("_")}
    modules = {name for name in public if inspect.ismodule(getattr(torchspan, name))}
    assert public - modules == set(torchspan.__all__) - {"__version__"}


def test_an_unknown_name_is_an_attribute_error_that_says_what_was_meant() -> None:
    with pytest.raises(AttributeError, match="no attribute 'compil'; did you mean 'compile'"):
        _ = torchspan.compil
