"""Paths: how a value is reached from the arguments and the model of a program."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import operator
import re
import weakref
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from torchspan.artifacts.values import decode, encode, loaded_module
from torchspan.core.errors import IntegrityError, UnsupportedError

Path = tuple[tuple[str, Any], ...]


_OF_A_TENSOR = ("size", "stride")


def parse_path(source: str, scope: Mapping[str, Any] | None = None) -> Path:
    """The steps to an object from dynamo's expression for it; ``G`` names are looked up in `scope`, where modules stand.

    >>> parse_path("L['target']._modules['fc'].bias")
    (('local', 'target'), ('attr', '_modules'), ('item', 'fc'), ('attr', 'bias'))

    Raises:
        UnsupportedError: an expression that is not a path of attributes and items.
    """
    return _steps(ast.parse(source, mode="eval").body, source, scope or {})


def _steps(node: ast.expr, source: str, scope: Mapping[str, Any]) -> Path:
    if isinstance(node, ast.Attribute):
        return (*_steps(node.value, source, scope), ("attr", node.attr))
    if isinstance(node, ast.Subscript):
        numbered = _numbered(node.slice)
        if numbered is not None:
            return (*_steps(node.value, source, scope), ("numbered", numbered))
        key = _constant(node.slice, source)
        if isinstance(node.value, ast.Name) and node.value.id in ("L", "G"):
            return (("local", key),) if node.value.id == "L" else (_global(key, source, scope),)
        whole = node.value
        if isinstance(whole, ast.Call) and isinstance(whole.func, ast.Attribute) and whole.func.attr in _OF_A_TENSOR:
            return (*_steps(whole.func.value, source, scope), (whole.func.attr, key))
        return (*_steps(node.value, source, scope), ("item", key))
    if isinstance(node, ast.Call) and not node.keywords:
        if not node.args and isinstance(node.func, ast.Subscript):  # a module's weak references, such as those of nn.LSTM
            return (*_steps(node.func, source, scope), ("referent", None))
        return _call_steps(ast.unparse(node.func), node.args, source, scope)
    raise UnsupportedError(f"a guard reads {source}, which an artifact cannot look up when it is loaded")


def _call_steps(function: str, args: list[ast.expr], source: str, scope: Mapping[str, Any]) -> Path:
    if function in ("type", "list", "dict.keys", "dict", "list(dict.keys)") and len(args) == 1:
        step = {"dict.keys": "keys"}.get(function, function)
        inner = _steps(args[0], source, scope)
        return inner if step == "dict" else (*inner, (step, None))
    if function in ("dict.__getitem__", "list.__getitem__", "tuple.__getitem__") and len(args) == 2:
        within = _steps(args[0], source, scope)
        return (*within, _item(function, args[1], within, source))
    if function == "___dataclass_fields" and len(args) == 1:
        return (*_steps(args[0], source, scope), ("fields", None))
    if function == "__import__" and len(args) == 1:
        return (("module", _constant(args[0], source)),)
    if function in ("object.__getattribute__", "getattr") and len(args) == 2:
        return (*_steps(args[0], source, scope), ("attr", _constant(args[1], source)))
    raise UnsupportedError(f"a guard reads {source}, which an artifact cannot look up when it is loaded")


_NUMBERED_KEY = r"list\(dict\.keys\(.*\)\)\[(\d+)\]"


def _numbered(node: ast.expr) -> int | None:
    """The number of a dict's key, where a source gives that in place of the key, as for a hook's, which differs by process."""
    match = re.fullmatch(_NUMBERED_KEY, ast.unparse(node))
    return None if match is None else int(match[1])


def _item(function: str, node: ast.expr, within: Path, source: str) -> tuple[str, Any]:
    """The step to an item; of a dict in a module by its key, as numbers differ by process, and past what its class makes."""
    numbered = _numbered(node)
    if numbered is not None and within[0][0] != "module":
        return ("numbered", numbered)
    key = _constant(node, source) if numbered is None else list(dict.keys(follow(within, {})))[numbered]
    return ("own_item" if function == "dict.__getitem__" else "item", key)


def _constant(node: ast.expr, source: str) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise UnsupportedError(f"a guard reads {source}, whose key is not a constant") from None


def _global(name: str, source: str, scope: Mapping[str, Any]) -> tuple[str, Any]:
    value = scope.get(name)
    if isinstance(value, ModuleType):
        return ("module", "__main__" if value.__name__ == "__mp_main__" else value.__name__)
    if value is vars(builtins):
        return ("builtins", None)
    raise UnsupportedError(f"a guard reads {source}, which dynamo keeps for this process only")


def encode_path(path: Path) -> list[list[Any]]:
    """A path as JSON."""
    return [[kind, encode(key)] for kind, key in path]


def decode_path(steps: list[list[Any]]) -> Path:
    """The path that `encode_path` wrote."""
    path = tuple((str(kind), decode(key)) for kind, key in steps)
    if not path or any(kind not in STEPS for kind, _ in path):
        raise IntegrityError(f"an artifact holds a path that cannot be followed: {steps}")
    return path


def show_path(path: Path) -> str:
    """A path as a person writes it.

    >>> show_path((("local", "target"), ("attr", "_modules"), ("item", "fc")))
    "target._modules['fc']"
    """
    text = ""
    for kind, key in path:
        if kind in ("local", "module"):
            text = str(key)
        elif kind == "attr":
            text += f".{key}"
        elif kind in ("item", "own_item"):
            text += f"[{key!r}]"
        elif kind == "numbered":
            text += f"[key {key}]"
        elif kind in _OF_A_TENSOR:
            text += f".{kind}({key})"
        else:
            text = f"{kind}({text})"
    return text


STEPS: Mapping[str, Callable[[Any], Callable[[Any], Any]]] = {
    "local": lambda name: operator.itemgetter(name),
    "module": lambda name: lambda _: loaded_module(name),
    "builtins": lambda _: lambda _values: vars(builtins),
    "attr": lambda name: _attribute_of(name),
    "item": lambda key: _item_of(key),
    "own_item": lambda key: lambda value: dict.__getitem__(value, key),
    "numbered": lambda number: lambda value: dict.__getitem__(value, list(dict.keys(value))[number]),
    "fields": lambda _: dataclasses.fields,
    "referent": lambda _: _referent,
    "type": lambda _: type,
    "list": lambda _: list,
    "keys": lambda _: lambda value: dict.keys(value),
    "size": lambda dim: lambda tensor: tensor.size(dim),
    "stride": lambda dim: lambda tensor: tensor.stride(dim),
}


def _referent(reference: Any) -> Any:
    if type(reference) is not weakref.ref:
        raise TypeError(f"a {type(reference).__name__} is not a weak reference")
    return reference()


def _attribute_of(name: Any) -> Callable[[Any], Any]:
    if type(name) is not str or "/" in name:  # ctypes.cdll opens a library for any attribute, and for any key
        raise IntegrityError(f"an artifact holds a path through {name!r:.80}, which is not the name of an attribute")
    return operator.attrgetter(name) if "." not in name else lambda value: getattr(value, name)


def _item_of(key: Any) -> Callable[[Any], Any]:
    if type(key) is str and "/" in key:
        return lambda value: dict.__getitem__(value, key)
    return operator.itemgetter(key)


def follow(path: Path, values: Mapping[str, Any]) -> Any:
    """The object at `path`, from ``target``, ``args`` and ``kwargs`` by name.

    >>> follow(parse_path("L['args'][0][1]"), {"args": ((5, 6),)})
    6
    """
    return following(path)(values)


def following(path: Path) -> Callable[[Mapping[str, Any]], Any]:
    """The same as a function of the values, which is refused now if it cannot be followed."""
    steps = [STEPS[kind](key) for kind, key in path]

    def find(values: Mapping[str, Any]) -> Any:
        value: Any = values
        for step in steps:
            value = step(value)
        return value

    return find
