"""The public names of a package, imported when they are first looked up.

A package says its names once, in the stub beside it (``__init__.pyi``), where type checkers and editors read them too.
"""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_IMPORT = re.compile(r"^from (\S+) import (\w+)(?: as (\w+))?", re.MULTILINE)


def public_names(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package, by its stub.

    >>> import torchspan.passes
    >>> look_up, _, names = public_names("torchspan.passes")
    >>> names[:2], look_up("Pass") is torchspan.passes.Pass
    (['Pass', 'PassContext'], True)
    """
    module = sys.modules[package]
    stub = Path(str(module.__file__)).with_suffix(".pyi").read_text(encoding="utf-8")
    places = {alias or name: (place, name) for place, name, alias in _IMPORT.findall(stub)}

    def look_up(name: str) -> Any:
        if name not in places:
            close = difflib.get_close_matches(name, places, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise AttributeError(f"module {package!r} has no attribute {name!r}{hint}")
        place, attribute = places[name]
        value = getattr(importlib.import_module(place), attribute)
        setattr(module, name, value)
        return value

    def names() -> list[str]:
        defined = {name for name, value in vars(module).items() if name.startswith("__") or name in places}
        submodules = {name for name in vars(module) if f"{package}.{name}" in sys.modules}
        return sorted(defined | submodules | set(places))

    return look_up, names, sorted(places)
