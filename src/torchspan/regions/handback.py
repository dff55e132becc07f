"""How compiled code comes from the child to the caller's process, which only loads.

Two ways::

    artifact   the child leaves a file that loads without tracing
    caches     the child fills torch's caches; here dynamo traces again (its bytecode and guards belong to a process) and
               inductor loads: where it would generate or build instead, the generation is given up
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from torchspan.artifacts.loading import Dispatcher, load
from torchspan.core.errors import GuardError
from torchspan.core.report import Report
from torchspan.jobs.groups import groups_here
from torchspan.private import dynamo
from torchspan.regions import caching
from torchspan.regions.backward import EagerBackward, is_in_backward
from torchspan.regions.call import original
from torchspan.regions.compiler_state import known_isas
from torchspan.regions.entry_point import breaking_at_old_collectives, entry_point
from torchspan.regions.marked import marked
from torchspan.regions.nested_class import nesting
from torchspan.regions.own_functions import differentiable
from torchspan.regions.part import Part
from torchspan.regions.settings import Settings
from torchspan.regions.signature import Dims


class Guarded:
    """Wraps a backend: raises nothing while it compiles, and counts its graphs and their calls. Inductor may only load.

    An error of the first compiled graph of a call is marked, see :func:`is_of_compiled_code`: the whole call can start over.
    It cannot after a later graph, as the program would repeat its side effects: a later graph that raises is run eagerly by
    itself. With several ranks its error is raised, because the graph may have issued collectives.
    """

    def __init__(self, backend: Callable[..., Any], give_up: Callable[..., None], call: _CallHere, *, is_loading: bool) -> None:
        self._backend = backend
        self._give_up = give_up
        self._call = call
        self._is_loading = is_loading
        self._has_ranks = groups_here() is not None
        self.graphs = 0
        self.calls = 0
        self.misses: list[str] = []

    def __call__(self, graph: Any, inputs: list[Any], **kwargs: Any) -> Callable[..., Any]:
        self.graphs += 1
        try:
            with caching.keeping_buffers(), caching.only_loading() if self._is_loading else nullcontext():
                compiled = self._backend(graph, inputs, **kwargs)
            eager = differentiable(graph)
        except caching.CacheMiss as cause:
            self.misses.append(str(cause))
            return graph.forward
        except Exception as cause:  # noqa: BLE001 - a foreign compiler; the graph runs eagerly and the generation is given up
            self.misses.append(f"{type(cause).__name__}: {cause}")
            return graph.forward
        if getattr(compiled, "__self__", None) is graph:  # the backend gives the graph itself, to be run eagerly
            compiled = eager.forward
        return self._counted(eager.forward, EagerBackward(eager.forward, compiled, self._give_up))

    def _counted(self, graph: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.calls += 1
            is_first = self._call.is_first_graph()
            try:
                return compiled(*args)
            except Exception as error:
                if is_first or is_in_backward() or self._has_ranks:  # other ranks expect each collective once
                    _mark(error)
                    raise
                cause = error
            outputs = graph(*args)  # if this raises too, it is the program's own
            self._give_up(f"compiled code raised {type(cause).__name__}: {cause}", "running")
            return outputs

        return call


class _CallHere(threading.local):
    """The call of a region that runs in this thread: how many of its graphs have run."""

    num_graphs = 0

    def is_first_graph(self) -> bool:
        """Count a graph; whether none has run before."""
        self.num_graphs += 1
        return self.num_graphs == 1

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, bool]:
        """Run a call, perhaps inside another one, and say whether any of its graphs has run."""
        outer, self.num_graphs = self.num_graphs, 0
        try:
            return function(*args, **kwargs), self.num_graphs > 0
        finally:
            self.num_graphs = outer


def _mark(error: Exception) -> None:
    if not is_in_backward():
        error.__dict__["torchspan_compiled"] = True


def is_of_compiled_code(error: BaseException) -> bool:
    """Whether compiled code raised this error, and not the program around it."""
    return "torchspan_compiled" in error.__dict__


class FromArtifact:
    """Compiled code from an artifact: it traces nothing, and needs neither dynamo nor inductor here."""

    name = "artifact"
    is_counting = False
    num_calls = 0

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

    def run_and_see(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, bool]:
        """Call, and say that compiled code ran; raises GuardError as `run` does."""
        return self.run(target, *args, **kwargs), True

    def serves(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether its guards hold in this call; nothing is run."""
        return any(entry.serves(original(target), args, kwargs) for entry in self._entries)


class FromCaches:
    """Compiled code from torch's caches: `trace` may trace (and load), `run_and_see` uses only what was traced."""

    name = "caches"

    def __init__(
        self, settings: Settings, part: Part, isas: Mapping[str, bool], dims: Dims, give_up: Callable[..., None]
    ) -> None:
        self._give_up = give_up
        self._call = _CallHere()
        self._isas = dict(isas)
        self._dims = dims
        self._nested = part.nested
        self._is_loading = settings.is_inductor
        self._guarded: list[Guarded] = []
        self._code = entry_point(part.is_called_inside)
        self._entry = settings.compile(self._code, self._wrap)
        self._run = dynamo.run(self._entry)

    def _wrap(self, backend: Callable[..., Any]) -> Guarded:
        self._guarded.append(Guarded(backend, self._give_up, self._call, is_loading=self._is_loading))
        return self._guarded[-1]

    def run_and_see(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, bool]:
        """Call, by what was traced, and say whether any compiled code ran."""
        return self._call.run(self._run, (target, *args), kwargs)

    def trace(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Call, and let dynamo trace what is new to it.

        Dynamo guards on hooks here. By default it does not, and code would ignore a hook that a module gets later.
        """
        with known_isas(self._isas), breaking_at_old_collectives(), dynamo.config.patch(skip_nnmodule_hook_guards=False):
            with marked(args, kwargs, self._dims), nesting(self._nested):
                return self._call.run(self._entry, (target, *args), kwargs)[0]

    def serves(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether dynamo's guards hold in this call; nothing is run."""
        return dynamo.guards_hold(self._code, {"target": target, "args": args, "kwargs": dict(kwargs)})

    @property
    def misses(self) -> list[str]:
        """Why graphs could not be loaded or compiled here."""
        return [miss for guarded in self._guarded for miss in guarded.misses]

    @property
    def num_calls(self) -> int:
        """How many compiled graphs were called so far."""
        return sum(guarded.calls for guarded in self._guarded)

    @property
    def is_counting(self) -> bool:
        """Whether `num_calls` grows with each call that runs compiled."""
        return any(guarded.graphs for guarded in self._guarded)
