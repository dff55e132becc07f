"""The database against the torch that is here."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from torchspan.scan._names import Names

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
        yield module
        if hasattr(module, "__path__"):
            yield from _public_modules(module)


def test_every_public_name_is_in_the_database(names: Names, here: int, modules: list[ModuleType]) -> None:
    missing = [
        f"{module.__name__}.{name}"
        for module in modules
        for name in {*getattr(module, "__all__", ()), *(name for name in dir(module) if not name.startswith("_"))}
        if not names.look_up(f"{module.__name__}.{name}").mask & here
    ]
    assert len(modules) > 150
    # what a test of torch's, or another package, sets on a module while this process runs
    assert missing == []


def test_every_argument_of_a_public_function_is_in_the_database(names: Names, here: int, modules: list[ModuleType]) -> None:
    missing = []
    num_arguments = 0
    for module in modules:
        for name in getattr(module, "__all__", ()):
            for keyword in _keywords(getattr(module, name)):
                num_arguments += 1
                if not names.accepting(f"{module.__name__}.{name}", keyword).mask & here:
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
