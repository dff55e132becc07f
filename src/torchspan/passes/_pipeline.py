"""Pipeline: passes in order, written as text, each checked before and after it runs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from torchspan.core.errors import GraphError, InputError, PassError, unknown_name
from torchspan.core.graph import Graph
from torchspan.passes._base import REGISTRY, Pass, PassContext
from torchspan.passes._instruments import Instrument

_ITEM = re.compile(r"\s*(?P<name>[^\s,{}]+)\s*(?:\{(?P<options>(?:[^{}\"']|\"[^\"]*\"|'[^']*')*)\})?\s*(?:,|$)")
_OPTION = re.compile(r"\s*(?P<key>[^\s=,]+)\s*=\s*(?P<value>\"[^\"]*\"|'[^']*'|[^,\"']+?)\s*(?:,|$)")


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order in which they run.

    >>> str(Pipeline.parse("transformer_block_bucketing{scatter=false}, regional_inductor"))
    'transformer_block_bucketing{scatter=False},regional_inductor'
    >>> Pipeline.parse("regional_inducto")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    torchspan.core.errors.UnknownNameError: no pass 'regional_inducto'; did you mean 'regional_inductor'? ...
    """

    passes: tuple[Pass, ...] = ()

    @staticmethod
    def parse(text: str) -> Pipeline:
        """The pipeline that `text` writes: names, comma-separated, each with its options as ``name{key=value,…}``."""
        return Pipeline(tuple(_make(name, options) for name, options in _items(text)))

    def __str__(self) -> str:
        return ",".join(str(one) for one in self.passes)

    def run(self, graph: Graph, context: PassContext | None = None, instruments: Sequence[Instrument] = ()) -> Graph:
        """The graph after every pass; PassError, which names the pass, if one fails or gives back what is not valid."""
        context = context or PassContext()
        graph.verify()
        for one in self.passes:
            graph = _checked(one, graph, context, instruments)
        return graph


def _checked(one: Pass, graph: Graph, context: PassContext, instruments: Sequence[Instrument]) -> Graph:
    """Run one pass between its checks."""
    one.require(graph)
    for instrument in instruments:
        instrument.before(one, graph)
    after = one.run(graph, context)
    verify_result(one, graph, after)
    for instrument in reversed(instruments):
        instrument.after(one, graph, after)
    return after


def verify_result(one: Pass, before: Graph, after: Graph) -> None:
    """Raise PassError unless `after` is a valid graph with the signature of `before`, and what the pass claims is true."""
    try:
        after.verify()
    except GraphError as cause:
        raise PassError(f"pass {one.name} gave back a graph that is not valid: {cause}") from cause
    if (after.inputs, after.outputs, after.kind) != (before.inputs, before.outputs, before.kind):
        raise PassError(f"pass {one.name} changed the graph's signature; a pass keeps inputs, outputs and kind")
    one.ensure(before, after)


# text


def _items(text: str) -> Iterator[tuple[str, str]]:
    position = 0
    while position < len(text) and text[position:].strip():
        match = _ITEM.match(text, position)
        if match is None:
            raise InputError(
                f"cannot read {text[position:]!r} in the pipeline {text!r}; expected name or name{{option=value}}, with commas"
            )
        yield match["name"], match["options"] or ""
        position = match.end()


def _make(name: str, options: str) -> Pass:
    if name not in REGISTRY.names():
        raise unknown_name("pass", name, REGISTRY.names(), "'torchspan passes' lists them")
    kind: type[Pass] = REGISTRY.get(name).PASS
    known = {f.name: f for f in fields(kind)}
    values: dict[str, Any] = {}
    for key, value in _options(name, options):
        if key not in known:
            listing = f"{name} has: {', '.join(known) or 'none'}"
            raise unknown_name(f"option of pass {name!r}", key, known, listing)
        if key in values:
            raise InputError(f"option {key!r} of pass {name!r} is given twice")
        values[key] = _value(name, known[key], value)
    return kind(**values)


def _options(name: str, text: str) -> Iterator[tuple[str, str]]:
    position = 0
    while position < len(text) and text[position:].strip():
        match = _OPTION.match(text, position)
        if match is None:
            raise InputError(f"cannot read {text[position:]!r} in the options of pass {name!r}; expected option=value")
        yield match["key"], match["value"]
        position = match.end()


def _value(name: str, option: Field[Any], text: str) -> Any:
    """The value that `text` writes, of the type that the option's default has."""
    kind = type(default_of(option))
    if kind is str:
        return text[1:-1] if text[:1] in "\"'" else text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if type(value) is kind or (kind is float and type(value) is int):
        return kind(value)
    raise InputError(f"option {option.name!r} of pass {name!r} is {text!r}; expected {_EXPECTED.get(kind, kind.__name__)}")


_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number"}


def default_of(option: Field[Any]) -> Any:
    """An option's default; every option of a pass has one."""
    if option.default_factory is not MISSING:
        return option.default_factory()
    return option.default


# listing


def describe_passes() -> list[dict[str, Any]]:
    """Every pass by name: ``name``, ``summary``, and ``options``, which are names with their defaults.

    >>> [row["name"] for row in describe_passes()]
    ['regional_inductor', 'transformer_block_bucketing']
    """
    kinds: list[type[Pass]] = [REGISTRY.get(name).PASS for name in REGISTRY.names()]
    return [
        {"name": kind.name, "summary": kind.summary, "options": {f.name: default_of(f) for f in fields(kind)}} for kind in kinds
    ]
