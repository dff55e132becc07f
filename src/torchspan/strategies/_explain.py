"""What dynamo makes of a program: its graphs, where it ends them early and why, its guards, what it compiled again."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from torchspan.strategies import _torch
from torchspan.strategies._compile_profile import GraphBreak
from torchspan.strategies._events import graph_facts


@dataclass(frozen=True)
class GraphFound:
    """A graph: the function and line that it begins in, how large it is, how many guards were there when it was done."""

    compile_id: str
    function: str | None
    site: str | None
    num_operations: int
    num_guards: int


@dataclass(frozen=True)
class Recompile:
    """A function that dynamo compiled again, and which guard had failed."""

    compile_id: str
    function: str
    site: str
    reason: str


@dataclass
class Explanation:
    """What dynamo made of a program so far."""

    graphs: list[GraphFound] = field(default_factory=list)
    breaks: list[GraphBreak] = field(default_factory=list)
    recompiles: list[Recompile] = field(default_factory=list)
    num_calls: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The explanation as plain values, for JSON."""
        return asdict(self)


@contextmanager
def explaining() -> Iterator[Explanation]:
    """Inside the block, ``torch.compile`` traces only, whatever backend is asked for: graphs run eagerly and are noted.

    Dynamo traces in this process, with the `fullgraph` and `dynamic` that the program asks for.
    """
    found = Explanation()

    def on_graph(graph: torch.fx.GraphModule, compile_id: str, num_guards: int) -> None:
        facts = graph_facts(graph)
        found.graphs.append(GraphFound(compile_id, facts["function"], facts["site"], facts["operations"], num_guards))

    def on_break(reason: str, stack: list[traceback.FrameSummary], compile_id: str) -> None:
        site = f"{stack[-1].filename}:{stack[-1].lineno}" if stack else None
        if not any((one.site, one.reason) == (site, reason) for one in found.breaks):
            found.breaks.append(GraphBreak(site, reason, compile_id))

    original = torch.compile

    def compile(model: Callable[..., Any] | None = None, **arguments: Any) -> Any:
        if model is None:
            return lambda program: compile(program, **arguments)
        found.num_calls += 1
        kept = {name: arguments[name] for name in ("fullgraph", "dynamic", "disable") if name in arguments}
        return original(model, backend="eager", **kept)

    with _torch.watching_compiler(lambda *event: None, on_graph, on_break), _torch.noting_recompiles() as again:
        torch.compile = compile
        try:
            yield found
        finally:
            torch.compile = original
            found.recompiles += [Recompile(*one) for one in again()]
