"""Hooks into the import system: a finder for missing modules, and callbacks for when a module is there."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from wrapt import register_post_import_hook

_waiting: dict[str, list[Callable[[ModuleType], None]]] = {}
_hooked: set[str] = set()


def when_imported(name: str, callback: Callable[[ModuleType], None]) -> Callable[[], None]:
    """Call `callback` with the module `name`: now if it is imported already, else when it is. Returns an undo."""
    _waiting.setdefault(name, []).append(callback)
    module = sys.modules.get(name)
    if module is not None:
        callback(module)
    elif name not in _hooked:
        _hooked.add(name)
        register_post_import_hook(_run_callbacks, name)  # cannot be taken back: one a name, and it looks into _waiting

    def undo() -> None:
        _waiting[name].remove(callback)

    return undo


def _run_callbacks(module: ModuleType) -> None:
    module = sys.modules.get(module.__name__, module)  # some put an object in their own place
    for callback in tuple(_waiting.get(module.__name__, ())):
        callback(module)


class MissingModuleFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands at the END of ``sys.meta_path``: it is asked only for modules that nothing else has."""

    def __init__(self, fill: dict[str, Callable[[ModuleType], None]]) -> None:
        self._fill = fill

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """A spec for a module that a backport provides; a package, where it provides modules in it."""
        if fullname not in self._fill:
            return None
        is_package = any(name.startswith(f"{fullname}.") for name in self._fill)
        return importlib.util.spec_from_loader(fullname, self, origin="torchspan", is_package=is_package)

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module with what its backport provides."""
        self._fill[module.__name__](module)


class AbsentModuleWatcher(importlib.abc.MetaPathFinder):
    """Stands at the end too: it finds no module, and reports the import of one that nothing else found."""

    def __init__(self, listeners: dict[str, Callable[[], None]]) -> None:
        self._listeners = listeners

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """No spec, ever."""
        if fullname in self._listeners:
            self._listeners[fullname]()
