"""A pytest plugin: a test module can be imported though this torch lacks names of its imports; tests that use one are skipped.

A test file of a newer torch imports names at its top that only some of its tests need: helpers of torch's own tests, parts of
torch that no backport provides. Each such name is a `MissingName` here, so that the other tests of the file can run.
"""

from __future__ import annotations

import ast
import functools
import importlib
import sys
import types
import unittest
from pathlib import Path
from typing import Any


class MissingName:
    """Stands for a name that is not here: what is made of it while tests are collected is missing too; a test skips.

    >>> MissingName("torch.a").b(1)
    <torch.a.b(), which is not here>
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return f"<{self._name}, which is not here>"

    def __getattr__(self, name: str) -> MissingName:
        if name.startswith("__"):
            raise AttributeError(name)
        return MissingName(f"{self._name}.{name}")

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self._skip_test()
        if len(arguments) == 1 and isinstance(arguments[0], types.FunctionType):
            return functools.wraps(arguments[0])(lambda *arguments, **options: self._skip_test())  # a decorator of a test
        return MissingName(f"{self._name}()")

    def __mro_entries__(self, bases: tuple[object, ...]) -> tuple[type, ...]:
        """What stands below it in a class statement: a class of tests that skips."""
        missing = repr(self)

        class Missing(unittest.TestCase):
            @classmethod
            def setUpClass(cls) -> None:
                raise unittest.SkipTest(f"needs {missing}")

        return (Missing,)

    def __index__(self) -> int:
        self._skip_test()
        raise TypeError(f"{self!r} is no number")

    def __lt__(self, other: object) -> bool:
        return bool(self.__index__())

    __gt__ = __le__ = __ge__ = __lt__

    def _skip_test(self) -> None:
        specs = [getattr(sys.modules.get(name), "__spec__", None) for name in test_modules]
        if test_modules and not any(getattr(spec, "_initializing", False) for spec in specs):
            raise unittest.SkipTest(f"needs {self._name}, which is not here")


test_modules: list[str] = []  # once they are imported, tests run


def pytest_pycollect_makemodule(module_path: Path) -> None:
    """Before a test module is imported."""
    provide_missing_names(module_path)


class ImportOf:
    """In a process that a test starts, which imports the test module anew; on `sys.meta_path` it looks on and finds nothing."""

    def __init__(self, module_path: Path) -> None:
        self.module_path = module_path

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Before the module at `module_path` is imported."""
        if name == self.module_path.stem:
            provide_missing_names(self.module_path)


def provide_missing_names(module_path: Path) -> None:
    """Put a MissingName in the place of each name of torch that the module at this path would not find."""
    test_modules.append(module_path.stem)
    for node in ast.parse(module_path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").partition(".")[0] == "torch":
            _provide(node.module or "", [alias.name for alias in node.names])


def _provide(module_name: str, names: list[str]) -> None:
    module = _module(module_name)
    for name in names:
        if not hasattr(module, name) and not _is_module(f"{module_name}.{name}"):
            setattr(module, name, MissingName(f"{module_name}.{name}"))


def _module(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as cause:
        _check_it_is(name, cause)
        module = sys.modules[name] = types.ModuleType(name)
        return module


def _is_module(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as cause:
        _check_it_is(name, cause)
        return False
    return True


def _check_it_is(name: str, cause: ModuleNotFoundError) -> None:
    """Raise unless the module `name`, or a package that it would be in, is what is not there: it may need another one."""
    if cause.name is None or not f"{name}.".startswith(f"{cause.name}."):
        raise cause
