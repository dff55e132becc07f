"""Modules of options that an older torch lacks: what cannot be set to another value here says why."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torchspan.backports._base import Backport, has_module
from torchspan.core.errors import UnsupportedError


@dataclass(frozen=True)
class FixedOptions(Backport):
    """A module of options, some fixed: `refusals` maps them to why; their value is that of `names`, else False."""

    refusals: Mapping[str, str] = field(default_factory=dict)

    def _build_module(self, module: str = "") -> dict[str, object]:
        """Give the module a class whose ``__setattr__`` refuses."""
        names = dict(super()._build_module(module))
        return names if module else {"__class__": _refusing(self, names), **names}


def patching(place: str) -> Callable[..., AbstractContextManager[None]]:
    """The function ``patch`` of the module `place`."""

    @contextmanager
    def patch(arg1: Any = None, arg2: Any = None, **changes: Any) -> Iterator[None]:
        """Inside, options have other values; raises UnsupportedError for one that cannot have it here.

        Takes a name and a value, a dict of them, or keywords.
        """
        values = {arg1: arg2} if isinstance(arg1, str) else {**(arg1 or {}), **changes}
        options = importlib.import_module(place)
        old_values = {name: getattr(options, name) for name in values}  # an AttributeError names what is no option
        try:
            for name, value in values.items():
                setattr(options, name, value)
            yield
        finally:
            for name, value in old_values.items():
                setattr(options, name, value)

    return patch


def lacks_module(place: str) -> Callable[[ModuleType | None], bool]:
    """Whether torch itself lacks the module, though `place` may be one of ours."""
    return lambda module: not has_module(place)


def _refusing(backport: FixedOptions, values: Mapping[str, object]) -> type[ModuleType]:
    def set_option(options: ModuleType, name: str, value: object) -> None:
        fixed = values.get(name, False)
        if name in backport.refusals and value != fixed:
            cause = f"{backport.refusals[name]}; {backport.reason_of(backport.target, name)}; leave it {fixed!r}"
            raise UnsupportedError(f"{backport.target}.{name} = {value!r}: {cause}")
        ModuleType.__setattr__(options, name, value)

    others = {name: False for name in backport.refusals if name not in values}
    return type("Options", (ModuleType,), {**others, "__setattr__": set_option})
