"""How compiled code comes from the child to the caller's process, which only loads.

Two ways, in order of preference::

    artifact   the child leaves a file that loads without tracing
    caches     the child fills torch's caches; here dynamo traces again (its bytecode and guards belong to a process) and
               inductor loads: where it would generate or build instead, the generation is given up
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torchspan.artifacts.load import Dispatcher, load
from torchspan.core.report import Report
from torchspan.strategies import _torch
from torchspan.strategies._settings import Settings


class LoadOnly:
    """A backend that stands before inductor and lets it load only; counts its graphs and their calls."""

    def __init__(self, inductor: Callable[..., Any]) -> None:
        self._inductor = inductor
        self.graphs = 0
        self.calls = 0
        self.misses: list[str] = []

    def __call__(self, graph: Any, inputs: list[Any], **kwargs: Any) -> Callable[..., Any]:
        self.graphs += 1
        try:
            with _torch.only_loading():
                loaded = self._inductor(graph, inputs, **kwargs)
        except _torch.CacheMiss as cause:
            self.misses.append(str(cause))
            return graph.forward
        except Exception as cause:  # noqa: BLE001 - a foreign compiler; the graph runs eagerly and the generation is given up
            self.misses.append(f"{type(cause).__name__}: {cause}")
            return graph.forward
        return self._counted(loaded)

    def _counted(self, loaded: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.calls += 1
            return loaded(*args)

        return call


class FromArtifact:
    """Compiled code from an artifact: it traces nothing, and needs neither dynamo nor inductor here."""

    name = "artifact"
    is_counting = False
    num_calls = 0

    def __init__(self, content: bytes, target: Callable[..., Any]) -> None:
        with tempfile.TemporaryDirectory(prefix="torchspan-") as folder:
            path = Path(folder) / "artifact"
            path.write_bytes(content)
            loaded = load(path, target, report=Report())
        assert isinstance(loaded.function, Dispatcher)
        self._entries = loaded.function.entries
        self.misses: list[str] = []

    def run(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Call; raises GuardError before anything runs if the program's state is not what it was compiled for."""
        return Dispatcher(target, self._entries, "what was compiled")(*args, **kwargs)

    trace = run


class FromCaches:
    """Compiled code from torch's caches: `trace` may trace (and load), `run` uses only what was traced."""

    name = "caches"

    def __init__(self, settings: Settings, is_block: bool, isas: Mapping[str, bool]) -> None:
        self._isas = dict(isas)
        self._loaders: list[LoadOnly] = []
        self._entry = settings.compile(_torch.entry_point(is_block), self._wrap)
        self.run = _torch.run_only(self._entry)

    def _wrap(self, inductor: Callable[..., Any]) -> LoadOnly:
        self._loaders.append(LoadOnly(inductor))
        return self._loaders[-1]

    def trace(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Call, and let dynamo trace what is new to it."""
        with _torch.known_isas(self._isas):
            return self._entry(target, *args, **kwargs)

    @property
    def misses(self) -> list[str]:
        """Why graphs could not be loaded."""
        return [miss for loader in self._loaders for miss in loader.misses]

    @property
    def num_calls(self) -> int:
        """How many compiled graphs were called so far; None where the backend does not say."""
        return sum(loader.calls for loader in self._loaders)

    @property
    def is_counting(self) -> bool:
        """Whether `num_calls` counts (only inductor's graphs pass through a loader)."""
        return bool(self._loaders)
