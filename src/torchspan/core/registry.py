"""Registry: the plug-ins of a folder, found by file name, imported on use."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
from functools import cache, cached_property
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from torchspan.core.errors import InputError, unknown_name


class Registry:
    """The plug-ins of one folder of torchspan, and those that other packages bring.

    A plug-in is a file whose name does not begin with ``_``; its file name is its name. Other packages add theirs through the
    entry-point group ``torchspan.<folder>``. A name taken twice is an error that names both.

    >>> "regional_inductor" in Registry("torchspan.passes", "pass").names()
    True
    """

    def __init__(self, package: str, kind: str) -> None:
        self.package = package
        self.kind = kind

    def names(self) -> list[str]:
        """Every plug-in's name, sorted; imports none of them."""
        return sorted(self._targets)

    def get(self, name: str) -> ModuleType:
        """The module of the plug-in `name`, imported now."""
        return importlib.import_module(self.target(name))

    def target(self, name: str) -> str:
        """Where the plug-in `name` is, as ``package.module``; imports nothing."""
        if name not in self._targets:
            raise unknown_name(self.kind, name, self._targets, f"there are: {', '.join(self.names()) or 'none'}")
        return self._targets[name]

    def docstring(self, name: str) -> str:
        """What the plug-in `name` says of itself, its first line a summary; read from its file, which is not imported.

        >>> Registry("torchspan.strategies", "strategy").docstring("eager")
        'Nothing is compiled: the last rung of every ladder.'
        """
        spec = importlib.util.find_spec(self.target(name))
        if spec is None or spec.origin is None:
            raise InputError(
                f"the {self.kind} {name!r} is {self.target(name)}, which is no file; expected a module that can be found"
            )
        return ast.get_docstring(ast.parse(Path(spec.origin).read_text("utf-8"))) or ""

    @cached_property
    def _targets(self) -> dict[str, str]:
        folder = importlib.import_module(self.package)
        targets: dict[str, str] = {}
        for info in pkgutil.iter_modules(folder.__path__):
            if not info.name.startswith("_"):
                targets[info.name] = f"{self.package}.{info.name}"
        for point in _entry_points().select(group=self.package):
            if point.name in targets:
                raise InputError(
                    f"two plug-ins want the name {point.name!r} in {self.package}: {targets[point.name]} and {point.value}; "
                    "uninstall or rename one"
                )
            targets[point.name] = point.value
        return targets


@cache
def _entry_points() -> Any:
    """What every installed package offers; read once, as that takes milliseconds."""
    return entry_points()
