"""Every example in a docstring is run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import torchspan

NOT_IMPORTED = {"torchspan.__main__", "torchspan.auto"}  # importing them does something
MODULES = sorted({info.name for info in pkgutil.walk_packages(torchspan.__path__, "torchspan.")} - NOT_IMPORTED)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    failed, tried = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.ELLIPSIS)
    assert failed == 0, f"{failed} of {tried} examples of {name} failed"
