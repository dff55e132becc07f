"""How compiled code comes from the child to the caller's process, which only loads.

Two ways::

    artifact   the child leaves a file that loads without tracing
    caches     the child fills torch's caches; here dynamo traces again (its bytecode and guards belong to a process) and
               inductor loads: where it would generate or build instead, the generation is given up
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from torchspan.artifacts.loading import Dispatcher, load
from torchspan.core.errors import GuardError
from torchspan.core.report import Report
from torchspan.private import dynamo
from torchspan.regions import caching
from torchspan.regions.backward import EagerBackward
from torchspan.regions.call import original
from torchspan.regions.compiler_state import known_isas
from torchspan.regions.entry_point import breaking_at_old_collectives, entry_point
from torchspan.regions.marked import marked
from torchspan.regions.nested_class import nesting
from torchspan.regions.part import Part
from torchspan.regions.settings import Settings
from torchspan.regions.signature import Dims


class Guarded:
    """A backend that stands before another: it raises nothing while it compiles, and counts its graphs and their calls.

    Inductor may only load behind it. What a compiled graph raises when it runs is marked, see :func:`is_of_compiled_code`.
    """

    def __init__(self, backend: Callable[..., Any], give_up: Callable[[str], None], *, is_loading: bool) -> None:
        self._backend = backend
        self._give_up = give_up
        self._is_loading = is_loading
        self.graphs = 0
        self.calls = 0
        self.misses: list[str] = []

    def __call__(self, graph: Any, inputs: list[Any], **kwargs: Any) -> Callable[..., Any]:
        self.graphs += 1
        try:
            with caching.keeping_buffers(), caching.only_loading() if self._is_loading else nullcontext():
                compiled = self._backend(graph, inputs, **kwargs)
        except caching.CacheMiss as cause:
            self.misses.append(str(cause))
            return graph.forward
        except Exception as cause:  # noqa: BLE001 - a foreign compiler; the graph runs eagerly and the generation is given up
            self.misses.append(f"{type(cause).__name__}: {cause}")
            return graph.forward
        return self._counted(EagerBackward(graph.forward, compiled, self._give_up))

    def _counted(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.calls += 1
            try:
                return compiled(*args)
            except Exception as error:
                _mark(error)
                raise

        return call


def _mark(error: Exception) -> None:
    if torch._C._current_graph_task_id() != -1:
        return  # inside a backward: activation checkpointing ends its recomputation by raising
    error.__dict__["torchspan_compiled"] = True


def is_of_compiled_code(error: BaseException) -> bool:
    """Whether compiled code raised it, and not what the program does around it."""
    return "torchspan_compiled" in error.__dict__


class FromArtifact:
    """Compiled code from an artifact: it traces nothing, and needs neither dynamo nor inductor here."""

    name = "artifact"
    is_counting = False
    num_calls = 0
    has_traced = True  # there are guards to ask

    def __init__(self, content: bytes, target: Callable[..., Any]) -> None:
        loaded = load(io.BytesIO(content), original(target), report=Report())
        assert isinstance(loaded.function, Dispatcher)
        self._entries = loaded.function.entries
        self.misses: list[str] = []

    def run(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Call; raises GuardError before anything runs if the program's state is not what it was compiled for."""
        try:
            return Dispatcher(original(target), self._entries, "what was compiled")(*args, **kwargs)
        except GuardError:
            raise
        except Exception as error:
            _mark(error)
            raise

    trace = run

    def serves(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether its guards hold in this call; nothing is run."""
        return any(one.serves(original(target), args, kwargs) for one in self._entries)


class FromCaches:
    """Compiled code from torch's caches: `trace` may trace (and load), `run` uses only what was traced."""

    name = "caches"

    def __init__(
        self, settings: Settings, part: Part, isas: Mapping[str, bool], dims: Dims, give_up: Callable[[str], None]
    ) -> None:
        self._give_up = give_up
        self._isas = dict(isas)
        self._dims = dims
        self._nested = part.nested
        self._is_loading = settings.is_inductor
        self.has_traced = False
        self._guarded: list[Guarded] = []
        self._code = entry_point(part.is_called_inside)
        self._entry = settings.compile(self._code, self._wrap)
        self.run = dynamo.run(self._entry)

    def _wrap(self, backend: Callable[..., Any]) -> Guarded:
        self._guarded.append(Guarded(backend, self._give_up, is_loading=self._is_loading))
        return self._guarded[-1]

    def trace(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Call, and let dynamo trace what is new to it."""
        self.has_traced = True
        with known_isas(self._isas), breaking_at_old_collectives():
            with marked(args, kwargs, self._dims), nesting(self._nested):
                return self._entry(target, *args, **kwargs)

    def serves(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether dynamo's guards hold in this call; nothing is run."""
        return dynamo.guards_hold(self._code, {"target": target, "args": args, "kwargs": dict(kwargs)})

    @property
    def misses(self) -> list[str]:
        """Why graphs could not be loaded or compiled here."""
        return [miss for one in self._guarded for miss in one.misses]

    @property
    def num_calls(self) -> int:
        """How many compiled graphs were called so far."""
        return sum(one.calls for one in self._guarded)

    @property
    def is_counting(self) -> bool:
        """Whether `num_calls` grows with each call that runs compiled."""
        return any(one.graphs for one in self._guarded)
