"""Records what a compile does, line by line while it runs, so that a compile process that is killed leaves its events."""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from torchspan.jobs.supervisor import EVENTS_VARIABLE
from torchspan.regions.compiler_events import watching_compiler

_KEPT = ("fn_name", "is_backward", "cache_state", "compile_id")


@contextmanager
def recording() -> Iterator[Path | None]:
    """Note what the compiler does inside the block, if this process was asked to; gives the job's folder then."""
    path = os.environ.pop(EVENTS_VARIABLE, None)
    if path is None:
        yield None
        return
    with open(path, "w", buffering=1) as file:
        recorder = _Recorder(file)
        recorder.note("job", "B", time.time_ns())
        with watching_compiler(recorder.event, recorder.graph, recorder.graph_break):
            yield Path(path).parent
        recorder.note("job", "E", time.time_ns())


class _Recorder:
    """Writes a JSON line an event."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._lock = threading.Lock()

    def note(self, name: str, kind: str, time_ns: int, **details: Any) -> None:
        line = {
            "name": name,
            "kind": kind,
            "ns": time_ns,
            "thread": threading.get_ident(),
            **details,
        }
        with self._lock:
            self._file.write(json.dumps(line) + "\n")

    def event(self, name: str, time_ns: int, kind: str, metadata: Mapping[str, Any]) -> None:
        """An event of torch's own begins (``B``) or ends (``E``)."""
        self.note(name, kind, time_ns, **{key: str(metadata[key]) for key in _KEPT if metadata.get(key) is not None})

    def graph(self, graph: torch.fx.GraphModule, compile_id: str, num_guards: int) -> None:
        """A backend is about to get `graph`."""
        self.note("graph", "graph", time.time_ns(), compile_id=compile_id, guards=num_guards, **graph_facts(graph))

    def graph_break(self, reason: str, stack: list[traceback.FrameSummary], compile_id: str) -> None:
        """Dynamo ends a graph before the end of its function."""
        site = f"{stack[-1].filename}:{stack[-1].lineno}" if stack else None
        self.note("break", "break", time.time_ns(), reason=reason, site=site, compile_id=compile_id)


def graph_facts(graph: torch.fx.GraphModule) -> dict[str, Any]:
    """How large `graph` is, and the line and function of the program that it begins in."""
    nodes = list(graph.graph.nodes)
    operations = [node for node in nodes if node.op.startswith("call_")]
    origin = next(filter(None, (_site_of(node.meta.get("stack_trace")) for node in operations)), (None, None))
    return {"site": origin[0], "function": origin[1], "nodes": len(nodes), "operations": len(operations)}


def _site_of(stack_trace: str | None) -> tuple[str, str] | None:
    """``file:line`` and the function of the innermost line of a node's stack."""
    lines = [line.strip() for line in (stack_trace or "").splitlines() if line.strip().startswith('File "')]
    if not lines:
        return None
    path, _, location = lines[-1].removeprefix('File "').partition('", line ')
    number, _, function = location.partition(", in ")
    return f"{path}:{number}", function
