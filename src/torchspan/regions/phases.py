"""The phases of a compile, and which of torch's own events belong to which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

PhaseName = Literal["start", "dynamo", "backend", "aot", "inductor", "c++", "triton", "run"]
PHASES: Mapping[PhaseName, str] = {
    "start": "the compile process: its start, the program sent to it",
    "dynamo": "tracing Python into graphs, and their guards",
    "backend": "the backend, outside AOTAutograd and inductor",
    "aot": "AOTAutograd: functional graphs of forward and backward",
    "inductor": "inductor: passes over the graph, scheduling, code",
    "c++": "the C++ compiler",
    "triton": "Triton",
    "run": "the first run, and what no event of torch covers",
}
# by how the names of torch's timed events begin; an event of another name belongs to the one around it
_BEGINNINGS: Mapping[str, PhaseName] = {
    "dynamo": "dynamo",
    "entire_frame_compile": "dynamo",
    "backend_compile": "backend",
    "create_aot_dispatcher_function": "aot",
    "aot_": "aot",
    "min_cut": "aot",
    "entire_backward_compile": "aot",
    "compile_fx": "inductor",
    "inductor_": "inductor",
    "fx_codegen_and_compile": "inductor",
    "_recursive_": "inductor",
    "compile_file": "c++",
    "triton": "triton",
    "CachingAutotuner": "triton",
    "async_compile": "triton",
}


def phase_of(event: str) -> PhaseName | None:
    """The phase of one of torch's timed events; None for one that belongs to the event around it.

    >>> phase_of("backend_compile"), phase_of("fx_graph_cache_lookup")
    ('backend', None)
    """
    return next((phase for begins, phase in _BEGINNINGS.items() if event.startswith(begins)), None)
