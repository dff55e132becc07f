"""Calls back with what dynamo, AOTAutograd and inductor do, while they do it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from torchspan.core.replaced import replaced
from torchspan.private import dynamo, fx


@contextmanager
def watching_compiler(
    on_event: Callable[[str, int, str, Mapping[str, Any]], None],
    on_graph: Callable[[torch.fx.GraphModule, str, int], None],
    on_break: Callable[[str, list[traceback.FrameSummary], str], None],
) -> Iterator[None]:
    """Call back with what dynamo, AOTAutograd and inductor do, from their own thread, while they do it.

    `on_event` is called for each timed event of torch: name, nanoseconds since the epoch, ``B`` or ``E``, metadata; `on_graph`
    for each graph before its backend gets it: graph, compile id, number of guards; `on_break` for each graph break: reason, the
    user's stack, compile id.
    """
    logger, output = dynamo.ChromiumEventLogger, dynamo.OutputGraph
    log_event, call_backend, end_graph = logger._log_timed_event, output.call_user_compiler, output.compile_subgraph

    def logged(self: Any, name: str, time_ns: int, phase: str, metadata: Any = None) -> Any:
        on_event(name, time_ns, phase, metadata or {})
        return log_event(self, name, time_ns, phase, metadata)

    def called(self: Any, graph: Any, *args: Any, **kwargs: Any) -> Any:
        on_graph(graph, _compile_id(), len(self.guards))
        return call_backend(self, graph, *args, **kwargs)

    def ended(self: Any, tx: Any, reason: Any, *args: Any, **kwargs: Any) -> Any:
        if reason.graph_break:
            on_break(str(reason.reason), list(reason.user_stack), _compile_id())
        return end_graph(self, tx, reason, *args, **kwargs)

    with (
        replaced(logger, "_log_timed_event", logged),
        replaced(output, "call_user_compiler", called),
        replaced(output, "compile_subgraph", ended),
    ):
        yield


def _compile_id() -> str:
    """Which compile is under way: dynamo's number of the frame, and how often that was compiled before."""
    return str(fx.CompileContext.current_compile_id())
