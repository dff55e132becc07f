"""How what a compiled function gives is written into an artifact: its structure, and where each part comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from torchspan.artifacts.entry import is_plain_class, result_builder
from torchspan.artifacts.guard_export import is_constant, returned_values
from torchspan.artifacts.paths import Path, encode_path, follow, parse_path
from torchspan.artifacts.shapes import shapes_of
from torchspan.artifacts.side_effects import kept_as_they_were
from torchspan.artifacts.size_conditions import example_of
from torchspan.artifacts.values import encode, name_of
from torchspan.capture.dynamo import Guards
from torchspan.core.errors import UnsupportedError
from torchspan.core.graph import output_node


def result_of(guards: Guards) -> tuple[Any, list[Any]]:
    """How the program's result is made of the graph's outputs and its inputs, as JSON, and what it stores on its objects.

    The captured bytecode runs once, with a stand-in for the graph, and what it gives is looked at; what it stored is put back.

    Raises:
        UnsupportedError: the program changes Python objects in other ways, or gives something that cannot be made again.
    """
    frame = guards.frame
    output = output_node(frame.module.graph)
    marks = tuple(torch.empty(0) for _ in output.args[0])
    with kept_as_they_were(frame, guards.program) as changed:
        result = guards.bind(lambda *_: marks)(guards.program.args, guards.program.kwargs)
    known: dict[int, Any] = {id(mark): {"output": index} for index, mark in enumerate(marks)}
    sizes = {example_of(size) for size in shapes_of(frame.context).symbols.values()}
    values = {"target": guards.program.target, "args": guards.program.args, "kwargs": dict(guards.program.kwargs)}
    for source in frame.sources:
        path = parse_path(source, frame.scope)
        value = follow(path, values)
        if isinstance(value, torch.Tensor):  # a size is a number, and equal numbers may be one object
            known.setdefault(id(value), {"path": encode_path(path)})
    for path, value in returned_values(frame, guards.program):
        if not is_constant(value):
            known.setdefault(id(value), {"path": encode_path(path)})
    for name in ("args", "kwargs"):
        _remember(values[name], (("local", name),), known)
    structure = _structure(result, known, guards.program.name)
    stores = [[encode_path(path), key, _structure(value, known, guards.program.name)] for path, key, value in changed]
    _refuse_sizes(structure, sizes, guards.program.name)
    try:
        again = result_builder(structure)(marks, values)
    except (LookupError, TypeError, ValueError) as cause:  # of a class of the program's
        raise UnsupportedError(f"an artifact cannot make again what {guards.program.name} returns: {cause}") from cause
    differs = _difference(again, result, "the result")
    if differs is not None:
        raise UnsupportedError(f"an artifact cannot make again what {guards.program.name} returns: {differs}")
    return structure, stores


def _difference(rebuilt: Any, original: Any, place: str) -> str | None:
    """Where a rebuilt result differs from the original, or None."""
    if rebuilt is original:
        return None
    if type(rebuilt) is not type(original):
        return f"{place} is a {type(original).__name__}, made again it is a {type(rebuilt).__name__}"
    if isinstance(original, torch.Tensor):
        return f"{place} is another tensor"
    pairs: list[tuple[Any, Any, str]] = []
    if isinstance(original, Mapping):
        if list(rebuilt) != list(original):
            return f"{place} has the keys {list(original)!r:.80}, made again {list(rebuilt)!r:.80}"
        pairs = [(rebuilt[key], original[key], f"{place}[{key!r}]") for key in original]
    elif isinstance(original, (tuple, list)):
        if len(rebuilt) != len(original):
            return f"{place} has length {len(original)}, made again {len(rebuilt)}"
        pairs = [
            (part, original_part, f"{place}[{index}]") for index, (part, original_part) in enumerate(zip(rebuilt, original))
        ]
    elif is_plain_class(type(original)):
        return _difference(vars(rebuilt), vars(original), place)
    elif not is_dataclass(original):
        is_same = bool(rebuilt == original or (rebuilt != rebuilt and original != original))
        return None if is_same else f"{place} is {original!r:.80}, made again {rebuilt!r:.80}"
    names = [field.name for field in fields(original)] if is_dataclass(original) else []
    pairs += [(getattr(rebuilt, name, None), getattr(original, name, None), f"{place}.{name}") for name in names]
    return next(filter(None, (_difference(*pair) for pair in pairs)), None)


def _refuse_sizes(structure: Any, sizes: set[int], name: str) -> None:
    """Raise for a number in the result that may be a dynamic size: it would be the same at every call."""
    if not isinstance(structure, dict) or not sizes:
        return
    if type(structure.get("constant")) is int and structure["constant"] in sizes:
        raise UnsupportedError(
            f"an artifact cannot tell whether the number {structure['constant']} that {name} returns is a dynamic size; "
            "make it with example sizes that equal no number in the result, or return the size as a tensor"
        )
    for item in (part for value in structure.values() if isinstance(value, list) for part in value):
        for part in item if isinstance(item, list) else [item]:
            _refuse_sizes(part, sizes, name)


def _remember(value: Any, path: Path, known: dict[int, Any]) -> None:
    if isinstance(value, (list, tuple, dict)):
        if value and len(path) > 1:
            known.setdefault(id(value), {"path": encode_path(path)})
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _remember(item, (*path, ("item", key)), known)
    elif isinstance(value, torch.Tensor):
        known.setdefault(id(value), {"path": encode_path(path)})


def _structure(value: Any, known: Mapping[int, Any], name: str) -> Any:
    if id(value) in known:
        return known[id(value)]
    kind = type(value)
    if kind in (tuple, list):
        return {kind.__name__: [_structure(item, known, name) for item in value]}
    if kind is dict or name_of(kind) == "collections:OrderedDict":
        return {kind.__name__: [[encode(key), _structure(item, known, name)] for key, item in value.items()]}
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return {"call": name_of(kind), "args": [_structure(item, known, name) for item in value], "kwargs": []}
    if hasattr(kind, "__dataclass_fields__"):
        items = [(field.name, getattr(value, field.name)) for field in fields(kind) if field.init]
        kwargs = [[field, _structure(item, known, name)] for field, item in items]
        return {"call": name_of(kind), "args": [], "kwargs": kwargs}
    if isinstance(value, torch.Tensor):
        raise UnsupportedError(
            f"an artifact cannot hold {name}: it returns a tensor that is neither computed nor one of its inputs"
        )
    if is_plain_class(kind):
        return {
            "object": name_of(kind),
            "attributes": [[key, _structure(item, known, name)] for key, item in vars(value).items()],
        }
    return {"constant": encode(value)}
