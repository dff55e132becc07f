"""What runs in the compile process: the program is rebuilt with zeros for weights, compiled, and run once."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from torchspan.artifacts.artifact import precompile
from torchspan.caches import ledger
from torchspan.core.errors import CompileError, TorchspanError
from torchspan.core.numerics import tensors
from torchspan.core.report import Report
from torchspan.jobs import transport
from torchspan.private import dynamo, inductor
from torchspan.regions import ambient, caching, events, transformers
from torchspan.regions.ambient import Ambient
from torchspan.regions.compiler_state import known_isas
from torchspan.regions.entry_point import entry_point
from torchspan.regions.marked import marked
from torchspan.regions.nested_class import nesting
from torchspan.regions.settings import Settings
from torchspan.regions.signature import Dims


@dataclass(frozen=True)
class Task:
    """One region with example inputs, whose dimensions `dims` are dynamic (none: as `settings` have it).

    `isas` is what the caller knows of this machine's vector instructions; `nested` are classes to compile as regions inside.
    """

    target: Callable[..., Any]
    is_block: bool
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    settings: Settings
    ambient: Ambient
    isas: Mapping[str, bool] = field(default_factory=dict)
    dims: Dims = ()
    nested: tuple[type[torch.nn.Module], ...] = ()


@dataclass(frozen=True)
class Filled:
    """What the compile process hands back: the bytes of an `artifact`, or (None) what lies in torch's caches now, and why."""

    graphs: int
    isas: Mapping[str, bool]
    artifact: bytes | None = None
    why_no_artifact: str | None = None
    kept: ledger.Kept = field(default_factory=ledger.Kept)


def compile_region(payload: bytes) -> bytes:
    """Compile a pickled Task into an artifact, or into torch's caches if it cannot be one; gives a pickled Filled."""
    return _run(payload, _compile_region)


def _compile_region(task: Task) -> Filled:
    isas = dict(task.isas)
    try:
        with known_isas(isas):
            return Filled(1, isas, _make_artifact(task))
    except TorchspanError as cause:
        why_not = f"no artifact: {cause}"
    except Exception as cause:  # noqa: BLE001 - a foreign compiler, in a way that the caches may do without
        why_not = f"no artifact: {type(cause).__name__}: {cause}"
    dynamo.reset()
    return _fill_caches(task, isas, why_not)


def fill_caches(payload: bytes) -> bytes:
    """Compile a pickled Task so that its results lie in torch's caches; gives a pickled Filled."""
    return _run(payload, lambda task: _fill_caches(task, dict(task.isas), None))


def _run(payload: bytes, compile_it: Callable[[Task], Filled]) -> bytes:
    with events.recording():
        task = _begin(payload)
        if not task.settings.is_inductor:
            return pickle.dumps(compile_it(task))
        with ledger.watching(inductor.cache_folder()) as note:
            try:
                filled = compile_it(task)
            except Exception as cause:
                if dropped := note().dropped:  # torch may have said it in words of its own
                    raise ledger.CorruptEntryError(f"{ledger.DAMAGED} {', '.join(dropped)}") from cause
                raise
            return pickle.dumps(replace(filled, kept=note()))


def profile_region(payload: bytes) -> bytes:
    """Compile a pickled Task as if for the first time, its caches in the job's folder; gives what was found of this machine."""
    with events.recording() as folder:
        task = _begin(payload)
        if folder is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
            os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
        isas = dict(task.isas)
        _compile(task, isas)
    return pickle.dumps(isas)


def _begin(payload: bytes) -> Task:
    task: Task = transport.loads(payload)
    transformers.register(task.target)
    ambient.restore(task.ambient)
    if task.settings.is_inductor:
        check_compiler()
    return task


def _make_artifact(task: Task) -> bytes:
    with ambient.modes(task.ambient):
        made = precompile(task.target, task.args, task.kwargs, verify=False, report=Report())
    file = io.BytesIO()
    made.save(file)
    return file.getvalue()


def _fill_caches(task: Task, isas: dict[str, bool], why_not: str | None) -> Filled:
    """Compile for the example inputs, and run once: forward, and backward where gradients are wanted."""
    before = caching.counters()  # an attempt at an artifact was counted too
    refusals: list[str] = []
    with caching.noting_refusals(refusals):
        _compile(task, isas)
    counted = {name: count - before[name] for name, count in caching.counters().items()}
    if task.settings.is_inductor:
        _check_saved(counted, refusals)
    return Filled(counted["graphs"], isas, None, why_not)


def _compile(task: Task, isas: dict[str, bool]) -> None:
    """Compile into torch's caches, and run once: forward, and backward where gradients are wanted."""
    with caching.caching(), known_isas(isas):
        _backward(call_task(task, task.settings.compile(entry_point(task.is_block))))


def call_task(task: Task, entry: Callable[..., Any]) -> Any:
    """Call `entry` as the task's caller would: with its inputs and modes, its dimensions marked, its classes nested."""
    with ambient.modes(task.ambient), marked(task.args, task.kwargs, task.dims), nesting(task.nested):
        return entry(task.target, *task.args, **task.kwargs)


def check_compiler() -> None:
    """Raise CompileError unless there is a C++ compiler for inductor's CPU kernels."""
    names = inductor.cxx_names()
    if not any(shutil.which(name) for name in names):
        raise CompileError(f"no C++ compiler: inductor looked for {', '.join(names)}; install g++ or set CXX")


def _backward(outputs: Any) -> None:
    """Run a backward through every output that has one, with zeros."""
    wanted = [one for one in tensors(outputs) if one.requires_grad and one.grad_fn is not None]
    if wanted:
        torch.autograd.backward(wanted, [torch.zeros_like(one) for one in wanted])


def _check_saved(counted: Mapping[str, int], refusals: Sequence[str]) -> None:
    kept = counted["saved"] + counted["hits"]
    if kept < counted["graphs"]:
        why = f": {refusals[0]}" if refusals else ""
        raise CompileError(f"torch's caches took {kept} of {counted['graphs']} graphs, so they cannot be handed over{why}")


def call_function(payload: bytes) -> bytes:
    """Call a function with arguments, both sent by :mod:`._transport`; gives its pickled result."""
    function, args = transport.loads(payload)
    return pickle.dumps(function(*args))
