"""Pipeline: passes in order, written as text, each checked before and after it runs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from torchspan.core.errors import GraphError, InputError, PassError, TorchspanError, unknown_name
from torchspan.core.graph import Graph
from torchspan.passes._base import REGISTRY, STAGES, Pass, PassContext
from torchspan.passes._instruments import Instrument
from torchspan.passes._verify import check_change

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

    def __post_init__(self) -> None:
        for second, pass_ in enumerate(self.passes):
            for before in self.passes[:second]:
                _check_order(before, pass_)

    @staticmethod
    def parse(text: str) -> Pipeline:
        """The pipeline that `text` writes: names, comma-separated, each with its options as ``name{key=value,…}``."""
        return Pipeline(tuple(_make(name, options) for name, options in _items(text)))

    def __str__(self) -> str:
        return ",".join(str(pass_) for pass_ in self.passes)

    def run(self, graph: Graph, context: PassContext | None = None, instruments: Sequence[Instrument] = ()) -> Graph:
        """The graph after every pass; PassError, which names the pass, if one fails or gives back what is not valid."""
        context = context or PassContext()
        graph.verify()
        for pass_ in self.passes:
            graph = _checked(pass_, graph, context, instruments)
        return graph


def _check_order(first: Pass, second: Pass) -> None:
    """Raise InputError unless `second` may come after `first`, by what both declare."""
    if second.name in first.conflicts or first.name in second.conflicts:
        raise InputError(f"passes {first.name!r} and {second.name!r} do the same work in two ways; expected one of them")
    if first.stage and second.stage and STAGES.index(first.stage) > STAGES.index(second.stage):
        reason = f"changes {_CHANGES[first.stage]} and so comes after what changes {_CHANGES[second.stage]}"
    elif second.name in first.after:
        reason = f"works on what {second.name} gives"
    else:
        return
    raise InputError(f"pass {first.name!r} {reason}; write {second},{first}")


_CHANGES = {
    "operators": "which operators compute",
    "memory": "what is kept for the backward",
    "communication": "how ranks talk",
    "compile": "what runs the graph",
}


def _checked(pass_: Pass, graph: Graph, context: PassContext, instruments: Sequence[Instrument]) -> Graph:
    """Run one pass between its checks."""
    pass_.require(graph)
    for instrument in instruments:
        instrument.before(pass_, graph)
    try:
        after = pass_.run(graph, context)
        verify_result(pass_, graph, after)
    except InputError:
        raise  # a mistake in an option
    except Exception as cause:  # a pass may be foreign code: whatever it raises is told as the pass's
        raise _failed(pass_, graph, cause, context, instruments) from cause
    for instrument in reversed(instruments):
        instrument.after(pass_, graph, after)
    return after


def _failed(
    pass_: Pass, graph: Graph, cause: Exception, context: PassContext, instruments: Sequence[Instrument]
) -> TorchspanError:
    """The error of a pass that failed, with what the instruments add to it."""
    text = f"pass {pass_.name} failed: {type(cause).__name__}: {cause}"
    error = cause if isinstance(cause, TorchspanError) else PassError(text)
    notes = [instrument.failed(pass_, graph, error, context) for instrument in instruments]
    return type(error)("; ".join([str(error), *filter(None, notes)]))


def verify_result(pass_: Pass, before: Graph, after: Graph) -> None:
    """Raise PassError unless `after` is a valid graph with the signature of `before`, and what the pass claims is true."""
    try:
        after.verify()
        if after is not before:
            check_change(before, after)
    except GraphError as cause:
        raise PassError(f"pass {pass_.name} gave back a graph that is not valid: {cause}") from cause
    if (after.inputs, after.outputs, after.kind) != (before.inputs, before.outputs, before.kind):
        raise PassError(f"pass {pass_.name} changed the graph's signature; a pass keeps inputs, outputs and kind")
    pass_.ensure(before, after)


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
    try:
        return kind(**values)
    except InputError as cause:
        raise InputError(f"pass {name!r} cannot take these options: {cause}") from cause


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
    """Every pass, in the order of stages: ``name``, ``summary``, ``stage``, ``claim``, ``conflicts``, ``after``, ``options``.

    `claim` is ``bitwise`` or how far numbers may differ; `options` are names with their defaults.

    >>> [(row["name"], row["stage"], row["claim"]) for row in describe_passes() if row["name"] == "transformer_block_bucketing"]
    [('transformer_block_bucketing', 'communication', 'bitwise')]
    """
    kinds: list[type[Pass]] = [REGISTRY.get(name).PASS for name in REGISTRY.names()]
    return [
        {
            "name": kind.name,
            "summary": kind.summary,
            "stage": kind.stage,
            "claim": kind.claim(),
            "conflicts": list(kind.conflicts),
            "after": list(kind.after),
            "options": {f.name: default_of(f) for f in fields(kind)},
        }
        for kind in sorted(kinds, key=lambda kind: (STAGES.index(kind.stage) if kind.stage else -1, kind.name))
    ]
