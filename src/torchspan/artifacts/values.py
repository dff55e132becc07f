"""Values as JSON and back, without pickle: constants, and where an object is found from (paths)."""

from __future__ import annotations

import enum
import math
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch

from torchspan.core.errors import IntegrityError, UnsupportedError

_TORCH_KINDS = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def encode(value: Any) -> Any:
    """A constant as JSON: plain values as they are, others as an object with one key, which is its kind.

    >>> encode((1, torch.float32, float("inf"), None))
    {'tuple': [1, {'dtype': 'float32'}, {'float': 'inf'}, None]}

    Raises:
        UnsupportedError: a value that JSON and this list of kinds do not cover.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind is list:
        return [encode(item) for item in value]
    return _encode_object(value, kind)


def _encode_object(value: Any, kind: type) -> Any:
    for name, torch_kind in _TORCH_KINDS.items():
        if kind is torch_kind:
            return {name: str(value).removeprefix("torch.")}
    if kind in (tuple, set, frozenset, torch.Size):
        items = [encode(item) for item in value]
        return {kind.__name__: sorted(items, key=repr) if kind in (set, frozenset) else items}
    if kind is dict:
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is torch.device:
        return {"device": str(value)}
    if kind in (slice, range):
        return {kind.__name__: [encode(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, enum.Enum):
        return {"enum": [name_of(kind), value.name]}
    if isinstance(value, type):
        return {"type": name_of(value)}
    if value is Ellipsis:
        return {"ellipsis": 0}
    raise UnsupportedError(f"a value of type {name_of(kind)} cannot be written into an artifact: {value!r:.80}")


def decode(value: Any) -> Any:
    """The constant that `encode` wrote.

    >>> decode(encode((1, torch.float32, slice(0, None))))
    (1, torch.float32, slice(0, None, None))
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise IntegrityError(f"an artifact's value has {len(value)} kinds: {sorted(value)}")
    ((kind, content),) = value.items()
    if kind not in _DECODERS:
        raise IntegrityError(f"an artifact holds a value of the unknown kind {kind!r}; it was made by another torchspan")
    return _DECODERS[kind](content)


def _torch_constant(kind: type) -> Callable[[str], Any]:
    def find(name: str) -> Any:
        value = getattr(torch, name, None)
        if not isinstance(value, kind):
            raise IntegrityError(f"an artifact names {name!r} as a {kind.__name__}; torch has none of that name")
        return value

    return find


def _member(kind: Any, name: str) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__):
        raise LookupError(f"{name_of(kind)} is not an enumeration with a member {name!r:.80}")
    return kind[name]


_DECODERS: Mapping[str, Callable[[Any], Any]] = {
    **{name: _torch_constant(kind) for name, kind in _TORCH_KINDS.items()},
    "float": float,
    "tuple": lambda items: tuple(decode(items)),
    "set": lambda items: set(decode(items)),
    "frozenset": lambda items: frozenset(decode(items)),
    "Size": lambda items: torch.Size(decode(items)),
    "dict": lambda items: {decode(key): decode(item) for key, item in items},
    "complex": lambda parts: complex(*parts),
    "bytes": bytes.fromhex,
    "device": torch.device,
    "slice": lambda parts: slice(*decode(parts)),
    "range": lambda parts: range(*decode(parts)),
    "enum": lambda names: _member(find_name(names[0]), names[1]),
    "type": lambda name: find_name(name),
    "ellipsis": lambda _: Ellipsis,
}


def name_of(thing: Any) -> str:
    """``module:qualified name`` of a class or function; the main module is ``__main__`` in a spawned child, too.

    >>> name_of(torch.nn.Linear)
    'torch.nn.modules.linear:Linear'
    """
    module = getattr(thing, "__module__", None) or ""
    qualname = getattr(thing, "__qualname__", None) or getattr(thing, "__name__", None) or type(thing).__qualname__
    return f"{'__main__' if module == '__mp_main__' else module}:{qualname}"


def find_name(name: str) -> Any:
    """What `name_of` named, among the modules that are imported already: nothing is imported because a file says so.

    Raises:
        LookupError: there is nothing of that name.
    """
    module_name, _, qualname = name.partition(":")
    value: Any = loaded_module(module_name)
    for part in qualname.split("."):
        if part == "<locals>" or not hasattr(value, part):
            raise LookupError(f"{name} cannot be found: {module_name} has no {qualname}")
        value = getattr(value, part)
    return value


def loaded_module(name: str) -> ModuleType:
    """A module that is imported already.

    Raises:
        LookupError: it is not.
    """
    module = sys.modules.get("__mp_main__" if name == "__main__" and "__mp_main__" in sys.modules else name)
    if module is None:
        raise LookupError(f"module {name} is not imported here; import what the model needs before the artifact is loaded")
    return module


# paths: where an object is found from
