"""The database against the torch that is here."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
import typing
import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from torchspan.scan._names import Names

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's, when its old names are looked at
_OPTIONAL = (
    "torch.utils.tensorboard",
    "torch.utils.benchmark.examples",
    "torch.testing",
    "torch.distributed.elastic.rendezvous",
)


@pytest.fixture(scope="module")
def names() -> Names:
    return Names.load()


@pytest.fixture(scope="module")
def here(names: Names) -> int:
    """The mask of the release that is here."""
    minor = ".".join(torch.__version__.split(".")[:2])
    if minor not in names.minors:
        pytest.skip(f"the database has no torch {minor}")
    return 1 << names.minors.index(minor)


@pytest.fixture(scope="module")
def modules() -> list[ModuleType]:
    """torch's public modules."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [torch, *_public_modules(torch)]


def _public_modules(package: ModuleType) -> Iterator[ModuleType]:
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if info.name.startswith(_OPTIONAL) or info.name.rpartition(".")[2].startswith("_"):
            continue
        try:
            module = importlib.import_module(info.name)
        except Exception:  # noqa: BLE001 (a module that this machine lacks something for)
            continue
        if "@py_builtins" in vars(module):  # pytest's, of a test of torch's
            continue
        yield module
        if hasattr(module, "__path__"):
            yield from _public_modules(module)


def test_every_public_name_is_in_the_database(names: Names, here: int, modules: list[ModuleType]) -> None:
    missing, num_untold = [], 0
    public = [(module, name) for module in modules for name in _public_names(module)]
    for module, name in public:
        result = names.look_up(f"{module.__name__}.{name}")
        if result.mask == 0 and not result.is_known:
            num_untold += 1  # the database says that it cannot tell
        elif not result.mask & here:
            missing.append(f"{module.__name__}.{name}")
    assert len(public) > 10_000
    assert missing == []
    assert num_untold < 0.02 * len(public)


def _public_names(module: ModuleType) -> set[str]:
    listed = {name for name in getattr(module, "__all__", ()) if hasattr(module, name)}  # some list what they lack
    results = {name for name in vars(module) if not name.startswith("_")}
    if sys.version_info >= (3, 12):  # with ``from typing import *`` a module has what a Python later than the database's adds
        results -= {name for name in results.intersection(typing.__all__) if vars(module)[name] is getattr(typing, name)}
    return listed | results


def test_every_argument_of_a_public_function_is_in_the_database(names: Names, here: int, modules: list[ModuleType]) -> None:
    missing = []
    num_arguments = 0
    for module in modules:
        for name in getattr(module, "__all__", ()):
            for keyword in _keywords(getattr(module, name, None)):
                num_arguments += 1
                result = names.accepting(f"{module.__name__}.{name}", keyword)
                if result.is_known and not result.mask & here:
                    missing.append(f"{module.__name__}.{name}({keyword}=)")
    assert num_arguments > 3000
    assert missing == []


def _keywords(value: object) -> list[str]:
    if not (inspect.isclass(value) or inspect.isroutine(value)) or not getattr(value, "__module__", "").startswith("torch"):
        return []
    try:
        parameters = inspect.signature(value).parameters.values()
    except (ValueError, TypeError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
