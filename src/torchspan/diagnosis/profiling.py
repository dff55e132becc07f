"""profile_compile: where the time and the memory of a compile went, and where it hung."""

from __future__ import annotations

import bisect
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchspan.core.errors import InputError
from torchspan.core.numerics import tensors
from torchspan.core.program import program_name
from torchspan.core.text import check_folder
from torchspan.diagnosis.profile import Event, GraphBreak, GraphCost, Phase, Profile
from torchspan.diagnosis.profile_page import page
from torchspan.jobs import transport
from torchspan.jobs.budget import DEFAULT_BUDGET, Budget
from torchspan.jobs.groups import groups_here
from torchspan.jobs.supervisor import Ending, Job, run_bounded
from torchspan.regions import ambient
from torchspan.regions.compiler_state import known_isas_here
from torchspan.regions.phases import PHASES, PhaseName, phase_of
from torchspan.regions.settings import Settings
from torchspan.regions.watch import Finished
from torchspan.regions.worker import Isas, Task


@dataclass(frozen=True)
class CompileProfile(Profile):
    """Where a compile's time and memory went: the figures of a Profile, as a page or as a trace."""

    def save_trace(self, path: str | Path) -> Path:
        """Write Chrome's trace format, which Perfetto and ``chrome://tracing`` open; gives the path."""
        return _write(path, json.dumps({"displayTimeUnit": "ms", "traceEvents": list(_trace_events(self))}))

    def save_html(self, path: str | Path) -> Path:
        """Write one self-contained page without scripts; gives the path."""
        return _write(path, page([self]))


def profile_compile(
    model: Callable[..., Any],
    inputs: Any,
    *,
    budget: Budget | None = None,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    options: Mapping[str, Any] | None = None,
) -> CompileProfile:
    """Compile `model` for `inputs` once, in a child process inside `budget`, and say where the time and the memory went.

    The compile is a cold one: its caches are empty and thrown away, and nothing of this process changes. Forward is compiled,
    and backward where gradients are wanted. C++ and Triton run in the compile's own process, one after the other.

    Args:
        model: a module or a function; its weights are not sent, the child has zeros in their place.
        inputs: a tuple or list of positional arguments, a mapping of keyword arguments, or one tensor.
        budget: seconds and memory; a compile that overruns them is ended, and the profile says where it was.
        backend, mode, fullgraph, dynamic, options: as for ``torch.compile``.

    Returns:
        The CompileProfile, also of a compile that hung, crashed or failed.

    Raises:
        InputError: a `model` that cannot be called, or one that cannot be sent to another process.

    >>> profile = profile_compile(lambda x: x.sin() + 1, torch.ones(4), backend="eager")
    >>> profile.outcome, [graph.num_operations for graph in profile.graphs]
    ('compiled', [2])
    """
    if not callable(model):
        raise InputError(f"what is profiled is a module or a function, not {type(model).__name__}")
    args, kwargs = _arguments(inputs)
    settings = Settings(backend, mode, dict(options or {}), fullgraph, dynamic)
    task = Task(model, False, args, kwargs, settings.to_send(), ambient.capture(), Isas(known_isas_here()))
    payload = transport.dumps(task, groups=groups_here())
    is_fresh = any(tensor.device.type not in ("cpu", "meta") for tensor in tensors((args, kwargs)))
    began_ns = time.time_ns()
    job = Job("torchspan.regions.worker:profile_region", payload, is_fresh, record=True)
    return profile_of(run_bounded(job, budget or DEFAULT_BUDGET), began_ns, program_name(model), settings)


def profile_of(ending: Ending, began_ns: int, region: str, settings: Settings) -> CompileProfile:
    """The profile of a recorded job that began at `began_ns` and ended so."""
    lines = [json.loads(line) for line in ending.events.splitlines() if line.endswith("}")]
    ended_ns = began_ns + int(ending.seconds * 1e9)
    events = _events(lines, began_ns, ended_ns)
    memory = tuple(((when - began_ns) / 1e9, used) for when, used in ending.memory)
    return CompileProfile(
        region=region,
        outcome=ending.outcome,
        seconds=ending.seconds,
        peak_bytes=ending.peak_bytes,
        phases=_phases(events, memory, ending.seconds),
        graphs=_graphs(lines, events),
        breaks=_breaks(lines),
        events=events,
        memory=memory,
        cause=ending.cause,
        where=ending.where,
        stack=None if ending.outcome == "compiled" else ending.stack or ending.traceback,
        open_events=tuple(event.name for event in events if event.is_open and event.name != "job"),
        commands=ending.commands,
        settings=_described(settings),
        versions={"torch": torch.__version__, "Python": platform.python_version()},
    )


def write_profiles(finished: Sequence[Finished], path: Path) -> Path:
    """Write the profiles of compiles that ended: one page (``.html``), or one trace (``.json``)."""
    profiles = [profile_of(job.ending, job.began_ns, job.region, job.settings) for job in finished]
    if path.suffix == ".html":
        return _write(path, page(profiles))
    events = [event for number, profile in enumerate(profiles, 1) for event in _trace_events(profile, number)]
    return _write(path, json.dumps({"displayTimeUnit": "ms", "traceEvents": events}))


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def _described(settings: Settings) -> dict[str, str]:
    options = ", ".join(f"{name}={value}" for name, value in settings.options.items())
    known = {"backend": settings.backend_name, "mode": settings.mode, "options": options}
    texts = {name: str(value) for name, value in known.items() if value}
    return texts | {"fullgraph": str(settings.fullgraph), "dynamic": str(settings.dynamic)}


# from lines to events


@dataclass
class _Open:
    """An event that has begun, and what is known of it so far."""

    name: str
    phase: PhaseName
    began_ns: int
    depth: int
    compile_id: str | None
    inner_ns: int = 0
    index: int = 0


def _events(lines: Sequence[Mapping[str, Any]], began_ns: int, ended_ns: int) -> tuple[Event, ...]:
    """The events in the order of their beginning, each thread's nested by itself."""
    stacks: dict[int, list[_Open]] = {}
    done: dict[int, Event] = {}
    number = 0
    for line in lines:
        stack = stacks.setdefault(line["thread"], [])
        if line["kind"] == "B":
            stack.append(_opened(line, stack, number))
            number += 1
        elif line["kind"] == "E" and any(event.name == line["name"] for event in stack):
            is_found = False
            while not is_found:  # what was left open by an exception ends with what is around it
                is_found = stack[-1].name == line["name"]
                _close(stack, line["ns"], began_ns, line["thread"], done, is_open=False)
    for thread, stack in stacks.items():
        while stack:
            _close(stack, max(ended_ns, stack[-1].began_ns), began_ns, thread, done, is_open=True)
    return tuple(done[index] for index in sorted(done))


def _opened(line: Mapping[str, Any], stack: Sequence[_Open], number: int) -> _Open:
    outer = stack[-1] if stack else None
    phase = phase_of(line["name"]) or (outer.phase if outer else "run")
    compile_id = line.get("compile_id") if line.get("compile_id") not in (None, "None") else None
    return _Open(line["name"], phase, line["ns"], len(stack), compile_id or (outer.compile_id if outer else None), index=number)


def _close(stack: list[_Open], now_ns: int, began_ns: int, thread: int, done: dict[int, Event], *, is_open: bool) -> None:
    event = stack.pop()
    took = now_ns - event.began_ns
    if stack:
        stack[-1].inner_ns += took
    done[event.index] = Event(
        event.name,
        event.phase,
        (event.began_ns - began_ns) / 1e9,
        took / 1e9,
        (took - event.inner_ns) / 1e9,
        event.depth,
        thread,
        event.compile_id,
        is_open,
    )


def _phases(events: Sequence[Event], memory: Sequence[tuple[float, int]], seconds: float) -> tuple[Phase, ...]:
    took = dict.fromkeys(PHASES, 0.0)
    for event in events:
        took[event.phase] += event.self_seconds
    covered = sum(event.seconds for event in events if event.depth == 0)
    took["start"] += max(0.0, seconds - covered)
    peaks: dict[str, int] = {}
    for phase, used in [*((_phase_at(events, when), used) for when, used in memory), *_levels(events, memory)]:
        peaks[phase] = max(used, peaks.get(phase, 0))
    return tuple(Phase(name, took[name], peaks.get(name)) for name in PHASES if took[name] > 0)


def _levels(events: Sequence[Event], memory: Sequence[tuple[float, int]]) -> Iterator[tuple[PhaseName, int]]:
    """How much memory there was when each event began: a short phase may fall between two measurements."""
    times = [when for when, _ in memory]
    for event in events:
        index = bisect.bisect_right(times, event.began_s) - 1
        if index >= 0:
            yield event.phase, memory[index][1]


def _phase_at(events: Sequence[Event], when: float) -> PhaseName:
    inside = [event for event in events if event.began_s <= when <= event.began_s + event.seconds]
    return max(inside, key=lambda event: event.depth).phase if inside else "start"


def _graphs(lines: Sequence[Mapping[str, Any]], events: Sequence[Event]) -> tuple[GraphCost, ...]:
    """The graphs by compile id; what dynamo traced again after a restart is the same graph."""
    costs: dict[str, dict[str, float]] = {}
    for event in events:
        by_phase = costs.setdefault(event.compile_id or "", {})
        by_phase[event.phase] = by_phase.get(event.phase, 0.0) + event.self_seconds
    graphs = {line["compile_id"]: line for line in lines if line["kind"] == "graph"}
    return tuple(
        GraphCost(
            key, graph["function"], graph["site"], graph["operations"], graph["nodes"], graph["guards"], costs.get(key, {})
        )
        for key, graph in graphs.items()
    )


def _breaks(lines: Sequence[Mapping[str, Any]]) -> tuple[GraphBreak, ...]:
    """Each break once, though dynamo comes to it again where a function is inlined first and then compiled by itself."""
    breaks: dict[tuple[Any, str], GraphBreak] = {}
    for line in lines:
        if line["kind"] == "break":
            breaks.setdefault((line["site"], line["reason"]), GraphBreak(line["site"], line["reason"], line["compile_id"]))
    return tuple(breaks.values())


# writing


def _trace_events(profile: CompileProfile, number: int = 1) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "pid": number, "tid": 0, "name": "process_name", "args": {"name": f"compile of {profile.region}"}}
    threads = {thread: index for index, thread in enumerate(dict.fromkeys(event.thread for event in profile.events), 1)}
    for event in profile.events:
        yield {
            "ph": "X",
            "pid": number,
            "tid": threads[event.thread],
            "name": event.name,
            "cat": event.phase,
            "ts": event.began_s * 1e6,
            "dur": event.seconds * 1e6,
            "args": {"phase": event.phase, "compile_id": event.compile_id, "never ended": event.is_open},
        }
    for when, used in profile.memory:
        yield {"ph": "C", "pid": number, "tid": 0, "name": "memory", "ts": when * 1e6, "args": {"bytes": used}}


def _write(path: str | Path, text: str) -> Path:
    target = check_folder(Path(path))
    target.write_text(text, encoding="utf-8", errors="backslashreplace")
    return target
