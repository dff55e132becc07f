"""Options that old torch lacks, added to a module of settings while a backport is in force."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from torchspan.private import config, inductor

_NOT_IN_KEYS = "_cache_config_ignore_prefix"  # inductor's option that names the options which do not matter to its caches


class ExtendedOptions(dict[str, Any]):
    """A table of options with some more; `native` is the table that torch has."""

    def __init__(self, native: dict[str, Any], more: Mapping[str, Any]) -> None:
        super().__init__({**native, **more})
        self.native = native


def has_native_option(module: ModuleType, name: str) -> bool:
    """Whether the configuration `module` has an entry of this name by itself; says the same while it is extended."""
    entries = vars(module)["_config"]
    while isinstance(entries, ExtendedOptions):
        entries = entries.native
    return name in entries


def with_options(
    options: Mapping[str, Any], left_out_by: str | None = _NOT_IN_KEYS
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Makes a table of options one that also has these, with their defaults.

    They do not enter keys of caches: the option `left_out_by` lists them (None: they enter).
    """

    def extend(entries: dict[str, Any]) -> dict[str, Any]:
        missing = {name: value for name, value in options.items() if name not in entries}
        if not missing:
            return entries
        new = {name: _option(value) for name, value in missing.items()}
        if left_out_by is not None:
            new[left_out_by] = _with_more_names(entries.get(left_out_by) or _option([]), list(missing))
        return ExtendedOptions(entries, new)

    return extend


def _option(default: Any) -> Any:
    return config._ConfigEntry(config._Config(default=default, value_type=None if default is None else type(default)))


def _with_more_names(entry: Any, names: list[str]) -> Any:
    extended = copy.copy(entry)
    for place in ("default", "user_override"):  # the second is a copy of the first once that has been read
        if isinstance(there := getattr(extended, place), list):
            setattr(extended, place, [*there, *names])
    return extended


def option_group(name: str) -> Callable[[Any], Any]:
    """Makes what stands for the options ``name.…`` in inductor's configuration, where it has none."""

    def make(group: Any) -> Any:
        return config.SubConfigProxy(inductor.config, f"{name}.") if group is None else group

    return make
