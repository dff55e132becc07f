"""Settings that this torch does not know: to set one is refused, where torch would keep an attribute that nothing reads.

``settings.json`` lists them with the releases that have them; ``tools/make_names_database.py`` makes it.
"""

from __future__ import annotations

import importlib
import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torchspan.core.errors import UnknownSettingError
from torchspan.core.report import current_report, user_site
from torchspan.environment.patch import Patch, Replacement

OWNER = "settings"
SETTINGS = Path(__file__).with_name("settings.json")


def setting_patches(version: str) -> list[Patch]:
    """The patches that refuse what torch `version` lacks of the settings of its modules and of tensors.

    What a backport provides, or the program itself has put there, can be set.
    """
    minor = ".".join(version.split(".")[:2])
    patches: list[Patch] = []
    for place, names in json.loads(SETTINGS.read_text()).items():
        lacking = {name: releases for name, releases in names.items() if minor not in releases.split()}
        if place == "torch.Tensor":
            patches += [
                Replacement(OWNER, "torch", f"Tensor.{name}", partial(_attribute, name, has), True)
                for name, has in lacking.items()
            ]
        elif lacking:
            patches.append(Replacement(OWNER, place, "__class__", partial(_with_refusal, lacking)))
    return patches


def _refuse(name: str, value: object, releases: str) -> None:
    """Record that `name` cannot be set here, and raise UnknownSettingError."""
    import torch

    owner, _, last = name.rpartition(".")
    first, *_, newest = [*releases.split(), releases.split()[-1]]
    minors = torch.__version__.split(".")[:2]
    is_gone = [int(part) for part in newest.split(".")] < [int(part) for part in minors]
    has = f"torch has this setting {'up to ' + newest if is_gone else 'since ' + first}"
    require = f"require torch{'<=' + newest if is_gone else '>=' + first}"
    report = current_report()
    if report is not None:
        report.decide("unsupported", f"{name} = {value!r}", "refused", has, user_site())
    raise UnknownSettingError(
        f"{name} = {value!r}: {has}; this is {torch.__version__}, where it would change nothing; {require}, or set it only "
        f"where hasattr({'x' if owner == 'torch.Tensor' else owner}, {last!r})"
    )


def _with_refusal(lacking: dict[str, str], kind: type[ModuleType]) -> type[ModuleType]:
    """A module's class that refuses to have what is `lacking` set, unless it is there by now."""

    def __setattr__(self: Any, name: str, value: object) -> None:
        if name in lacking and not hasattr(self, name):
            _refuse(f"{self.__name__}.{name}", value, lacking[name])
        kind.__setattr__(self, name, value)

    def __reduce__(self: Any) -> Any:  # as pickles of plain modules that cloudpickle makes
        return importlib.import_module, (self.__name__,)

    return type(kind.__name__, (kind,), {"__setattr__": __setattr__, "__reduce__": __reduce__, "__module__": kind.__module__})


class _Missing:
    """An attribute of tensors that this torch lacks: a program finds none, and cannot set it."""

    def __init__(self, name: str, releases: str) -> None:
        self.name, self.releases = name, releases

    def __get__(self, tensor: object, owner: type) -> Any:
        asks = sys._getframe(1).f_globals.get("__name__") or ""
        if tensor is None and (asks == "torch" or asks.startswith("torch.")):
            return self  # torch lists what is in the class
        raise AttributeError(f"{owner.__name__!r} object has no attribute {self.name!r}", name=self.name, obj=tensor)

    def __set__(self, tensor: object, value: object) -> None:
        _refuse(f"torch.Tensor.{self.name}", value, self.releases)


def _attribute(name: str, releases: str, old: object) -> object:
    return _Missing(name, releases) if old is None else old
