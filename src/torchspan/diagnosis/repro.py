"""A failed compile as a folder that shows the same failure in a fresh process, for a report to whoever can mend it."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import platform
import select
import signal
import subprocess
import textwrap
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import cloudpickle  # type: ignore[import-untyped]
import torch

from torchspan.core.errors import InputError
from torchspan.core.numerics import tensors
from torchspan.jobs import transport
from torchspan.jobs.budget import DEFAULT_BUDGET, Budget
from torchspan.jobs.supervisor import Ending, Job, run_bounded
from torchspan.private import aot, config, dynamo, inductor
from torchspan.regions import ambient
from torchspan.regions.caching import caching
from torchspan.regions.compiler_state import known_isas
from torchspan.regions.entry_point import entry_point
from torchspan.regions.settings import Settings
from torchspan.regions.worker import Task, _backward, _begin, call_task

MAX_TRY_S = 30.0
HANG_S = 20
TRIED = ("failed", "timeout", "crashed")


@dataclass(frozen=True)
class Repro:
    """A written reproduction.

    `kind` is ``graph`` (`program` needs torch alone) or ``program`` (the user's own code, pickled: it needs torchspan and
    cloudpickle too). `num_operations` of the graph, from `num_operations_before` where torch's minifier made it smaller.
    """

    program: Path
    kind: Literal["graph", "program"]
    num_operations: int | None = None
    num_operations_before: int | None = None


@dataclass(frozen=True)
class _Search:
    """What a child is to look for: a graph of a pickled Task whose compile ends as `outcome` says, within `try_s` each."""

    payload: bytes
    folder: str
    outcome: str
    try_s: float


def write_repro(
    payload: bytes, settings: Settings, ending: Ending, folder: str | Path, *, budget: Budget | None = None
) -> Repro:
    """Write `folder` with ``repro.py``, what it needs, and ``about.json``: inputs, versions, settings and what went wrong.

    `payload` is the pickled Task whose compile ended with `ending`. The graphs are tried one by one in a child inside
    `budget`, and the first that ends so by itself is made as small as torch's minifier can.

    Raises:
        InputError: a compile that did not fail, or a folder that cannot be made.
    """
    if ending.outcome not in ("failed", "timeout", "memory", "crashed"):
        raise InputError(f"a compile that is {ending.outcome!r} needs no reproduction; expected one that went wrong")
    target = Path(folder).absolute()
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise InputError(f"no folder can be made at {str(target)!r}: {cause}") from cause
    graph_facts: dict[str, Any] = {}
    if ending.outcome in TRIED:
        share = 1.0 if ending.outcome == "timeout" else 1.5  # a graph alone takes no longer than all of it did
        search = _Search(payload, str(target), ending.outcome, min(MAX_TRY_S, max(2.0, share * ending.seconds)))
        run_bounded(Job("torchspan.diagnosis.repro:search_graph", pickle.dumps(search)), budget or DEFAULT_BUDGET)
        graph_facts = _read(target / "graph.json")  # also of a search that ran out of its budget
    if not graph_facts:
        _write_program(target, payload, ending)
    _write_about(target, payload, settings, ending, graph_facts)
    (target / "graph.json").unlink(missing_ok=True)
    return Repro(
        target / "repro.py",
        "graph" if graph_facts else "program",
        graph_facts.get("num_operations"),
        graph_facts.get("num_operations_before"),
    )


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _write_about(target: Path, payload: bytes, settings: Settings, ending: Ending, graph_facts: dict[str, Any]) -> None:
    task: Task = transport.loads(payload)
    about = {
        "outcome": ending.outcome,
        "cause": ending.cause,
        "where": ending.where,
        "seconds": ending.seconds,
        "peak_bytes": ending.peak_bytes,
        "stack": ending.stack or ending.traceback,
        "commands": ending.commands,
        "graph": graph_facts or None,
        "settings": {**asdict(replace(settings, backend=settings.backend_name)), "backend": settings.backend_name},
        "inputs": [_described(tensor) for tensor in tensors((task.args, task.kwargs))],
        "process": {name: str(value) for name, value in task.ambient.switches.items()},
        "versions": versions(),
    }
    (target / "about.json").write_text(json.dumps(about, indent=1, default=str))


def versions() -> dict[str, str]:
    """What a report of a compiler's fault names: torch, Python, the system and the C++ compiler."""
    try:
        compiler = subprocess.run(
            [*inductor.cxx_names()[-1:], "--version"], capture_output=True, text=True, timeout=20, check=False
        )
        named = compiler.stdout.partition("\n")[0]
    except (OSError, subprocess.TimeoutExpired) as cause:
        named = f"not found: {cause}"
    return {"torch": torch.__version__, "Python": platform.python_version(), "system": platform.platform(), "c++": named}


def _described(tensor: torch.Tensor) -> dict[str, Any]:
    return {
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()) if tensor.layout is torch.strided else None,
        "dtype": str(tensor.dtype),
        "device": str(tensor.device),
        "requires_grad": tensor.requires_grad,
    }


# in the child: which graph it is


def search_graph(payload: bytes) -> bytes:
    """Find the graph of a Task that goes wrong by itself, write its program, and make it smaller as long as there is time."""
    search: _Search = pickle.loads(payload)
    task = _begin(search.payload)
    torch.set_num_threads(1)  # trials are forked

    graphs: list[tuple[torch.fx.GraphModule, list[Any]]] = []

    def collect(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append((graph, list(inputs)))
        return graph.forward

    entry = replace(task.settings, backend=collect, mode=None, options={}).compile(entry_point(task.is_block))
    signs: list[str] = []
    with ambient.modes(task.ambient):
        entry(task.target, *task.args, **task.kwargs)
        dynamo.reset()
        for graph, inputs in graphs:  # only now: what is compiled inside another compile runs eagerly
            sign = _sign(graph, inputs, task, search.try_s)
            signs.append(sign)
            if sign.startswith(search.outcome):
                _shrink(graph, inputs, task, search, sign)
                return b"found"
    return f"no graph does by itself: {signs}".encode()


def _shrink(graph: torch.fx.GraphModule, inputs: Sequence[Any], task: Task, search: _Search, sign: str) -> None:
    num_before = _num_operations(graph)

    def keep(smaller: torch.fx.GraphModule, its_inputs: Sequence[Any]) -> None:
        _write_graph(Path(search.folder), smaller, its_inputs, task, search.outcome, num_before)

    keep(graph, inputs)
    if all(isinstance(value, torch.Tensor) for value in inputs):
        real = [_like(value) for value in inputs]
        aot.minify(graph, real, lambda candidate, its: _sign(candidate, its, task, search.try_s) == sign, keep)


def _like(tensor: torch.Tensor) -> torch.Tensor:
    shape, stride = tuple(map(int, tensor.shape)), tuple(map(int, tensor.stride()))
    result = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device)
    return result.zero_().requires_grad_(tensor.requires_grad)


def _num_operations(graph: torch.fx.GraphModule) -> int:
    return sum(node.op.startswith("call_") for node in graph.graph.nodes)


def _sign(graph: torch.fx.GraphModule, inputs: Sequence[Any], task: Task, limit_s: float) -> str:
    """How the compile of `graph` ends, in a fork: ``failed: KIND``, ``timeout``, ``crashed: SIGNAL`` or empty."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os._exit(_try(graph, inputs, task, write))
    os.close(write)
    try:
        if not select.select([read], [], [], limit_s)[0]:
            return "timeout"
        answer = os.read(read, 4096).decode(errors="replace")
    finally:
        os.close(read)
        status = _end(pid)
    if answer:
        return "" if answer == "done" else f"failed: {answer}"
    return f"crashed: {signal.Signals(os.WTERMSIG(status)).name}" if os.WIFSIGNALED(status) else "crashed: exit"


def _try(graph: torch.fx.GraphModule, inputs: Sequence[Any], task: Task, write: int) -> int:
    try:
        with caching(), known_isas(dict(task.isas)):
            real = [_like(value) if isinstance(value, torch.Tensor) else value for value in inputs]
            outputs = _backend(task.settings)(graph, real)(*real)  # dynamo leaves the code of graphs alone
            _backward(outputs)
    except Exception as cause:  # noqa: BLE001 - a foreign compiler: its kind is what the search goes by
        deepest: BaseException = cause
        while deepest.__cause__ is not None:
            deepest = deepest.__cause__
        os.write(write, type(deepest).__name__.encode())
        return 1
    os.write(write, b"done")
    return 0


def _backend(settings: Settings) -> Callable[..., Any]:
    if settings.is_inductor:
        return inductor.backend(settings.mode, settings.options, bool(settings.dynamic))
    return dynamo.backend_function(settings.backend)


def _end(pid: int) -> int:
    """End the trial with what it started; its status, if it had ended by itself."""
    deadline = time.monotonic() + 0.2
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


# the program


_TEMPLATE = '''\
"""A compile that goes wrong: {outcome}. Run it with "{command}"; about.json says on what and how it was seen."""

from __future__ import annotations

import faulthandler
import sys
from math import inf, nan

import torch
from torch import device, tensor
{imports}
faulthandler.enable()
{configs}
{module}

INPUTS = (
{inputs}
)


def main():
{watch}    outputs = torch.compile(Repro(), {arguments})(*INPUTS)
    outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    results = [value for value in outputs if isinstance(value, torch.Tensor) and value.requires_grad]
    if results:
        torch.autograd.backward(results, [torch.zeros_like(value) for value in results])
    print("compiled: nothing went wrong")


if __name__ == "__main__":
    main()
'''


_WATCH = """\
torch.compile(torch.sin, backend="eager")(torch.ones(1))  # what dynamo imports is no part of the hang
limit_s = float(sys.argv[1]) if sys.argv[1:] else {default_s}
faulthandler.dump_traceback_later(limit_s, exit=True)  # ends it, and shows where it hangs
"""


def _command(outcome: str) -> str:
    return "python repro.py [seconds]" if outcome == "timeout" else "python repro.py"


def _write_graph(
    folder: Path, graph: torch.fx.GraphModule, inputs: Sequence[Any], task: Task, outcome: str, num_before: int
) -> None:
    imports, backend = _backend_code(folder, task.settings.backend)
    arguments = [f"backend={backend}", f"fullgraph={task.settings.fullgraph}", f"dynamic={bool(task.settings.dynamic)}"]
    arguments += [f"mode={task.settings.mode!r}"] if task.settings.mode else []
    arguments += [f"options={dict(task.settings.options)!r}"] if task.settings.options else []
    text = _TEMPLATE.format(
        outcome=outcome,
        command=_command(outcome),
        imports=imports,
        configs=config.config_code(),
        module=dynamo.module_code(graph),
        inputs="\n".join(f"    {_input_code(value)}," for value in inputs),
        watch=textwrap.indent(_WATCH.format(default_s=HANG_S), "    ") if outcome == "timeout" else "",
        arguments=", ".join(arguments),
    )
    part = folder / "repro.part"
    part.write_text(text)
    part.rename(folder / "repro.py")
    counted = {"num_operations": _num_operations(graph), "num_operations_before": num_before}
    (folder / "graph.json").write_text(json.dumps(counted))


def _input_code(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(int(value)) if isinstance(value, torch.SymInt) else repr(value)
    shape, stride = tuple(map(int, value.shape)), tuple(map(int, value.stride()))
    code = f"torch.empty_strided({shape}, {stride}, dtype={value.dtype}, device={str(value.device)!r}).zero_()"
    return f"{code}.requires_grad_()" if value.requires_grad else code


def _backend_code(folder: Path, backend: str | Callable[..., Any]) -> tuple[str, str]:
    """The lines that bring a backend, and the expression for it: its name, its source, or what was pickled of it."""
    if isinstance(backend, str):
        return "", repr(backend)
    source = _source(backend)
    if source is not None:
        return source, backend.__name__
    (folder / "backend.pickle").write_bytes(cloudpickle.dumps(backend))
    lines = "import pathlib\nimport pickle  # of cloudpickle's kind\n\nHERE = pathlib.Path(__file__).parent\n"
    return lines, 'pickle.loads((HERE / "backend.pickle").read_bytes())'


def _source(function: Callable[..., Any]) -> str | None:
    """The text of a function that needs nothing but modules around it; None for any other."""
    code = getattr(function, "__code__", None)
    if code is None or code.co_freevars or function.__name__ == "<lambda>":
        return None
    used = {name: function.__globals__[name] for name in code.co_names if name in function.__globals__}
    if not all(isinstance(value, types.ModuleType) for value in used.values()):
        return None
    try:
        text = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return None
    if not text.startswith("def "):
        return None
    imports = [f"import {value.__name__} as {name}" for name, value in used.items()]
    return "\n".join([*imports, "", "", text])


_PROGRAM = '''\
"""A compile that goes wrong: {outcome}. Run it with "{command}"; about.json says on what and how it was seen.

It needs torch, torchspan and cloudpickle.
"""

import faulthandler
import pathlib
import sys

import torch

from torchspan.diagnosis.repro import run_task

faulthandler.enable()
{watch}run_task((pathlib.Path(__file__).parent / "program.pickle").read_bytes())
print("compiled: nothing went wrong")
'''


def _write_program(folder: Path, payload: bytes, ending: Ending) -> None:
    watch = _WATCH.format(default_s=HANG_S) if ending.outcome == "timeout" else ""
    try:
        content = transport.dumps(transport.loads(payload), is_for_elsewhere=True)
    except InputError:  # what the program's own modules hold cannot be copied: it needs them beside it
        content = payload
    (folder / "program.pickle").write_bytes(content)
    (folder / "repro.py").write_text(_PROGRAM.format(outcome=ending.outcome, command=_command(ending.outcome), watch=watch))


def run_task(payload: bytes) -> None:
    """Compile what was pickled for a compile process, in this process and without a budget: for a reproduction."""
    task = _begin(payload)
    _backward(call_task(task, task.settings.compile(entry_point(task.is_block))))
