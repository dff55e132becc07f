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
from torchspan.jobs.groups import groups_here, portable_groups, pretend
from torchspan.private import dynamo, inductor
from torchspan.regions import ambient, caching, events, transformers, verify
from torchspan.regions.ambient import Ambient
from torchspan.regions.collectives import Collectives, collectives_of
from torchspan.regions.compiler_state import known_isas
from torchspan.regions.entry_point import breaking_at_old_collectives, entry_point
from torchspan.regions.marked import marked
from torchspan.regions.nested_class import nesting
from torchspan.regions.settings import Settings
from torchspan.regions.signature import Dims
from torchspan.regions.sources import sources_here


class Isas(dict[str, bool]):
    """Which of a machine's vector instructions work."""


APART = (Ambient, Isas)  # sent separately: two programs are the same whatever these are


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
    isas: Isas = field(default_factory=Isas)
    dims: Dims = ()
    nested: tuple[type[torch.nn.Module], ...] = ()


@dataclass(frozen=True)
class Filled:
    """What the compile process hands back: the bytes of an `artifact`, or (None) what lies in torch's caches now, and why.

    `collectives` are those of a call with its backward, in a job of several ranks; code that issues some was compared with
    eager in that process, unless it was `not_verified`, with a reason.
    """

    graphs: int
    isas: Mapping[str, bool]
    artifact: bytes | None = None
    why_no_artifact: str | None = None
    kept: ledger.Kept = field(default_factory=ledger.Kept)
    collectives: Collectives = field(default_factory=Collectives)
    not_verified: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict)  # the files that the program is made of, see :mod:`.sources`


def compile_region(payload: bytes) -> bytes:
    """Compile a pickled Task into an artifact, or into torch's caches if it cannot be one; gives a pickled Filled."""
    return _run(payload, _compile_region)


def _compile_region(task: Task, expected: Collectives) -> Filled:
    isas = dict(task.isas)
    if expected:
        return _fill_caches(task, expected, isas, "no artifact: the program has collectives")
    try:
        with known_isas(isas):
            return Filled(1, isas, _make_artifact(task))
    except TorchspanError as cause:
        why_not = f"no artifact: {cause}"
    except Exception as cause:  # noqa: BLE001 - a foreign compiler, in a way that the caches may do without
        why_not = f"no artifact: {type(cause).__name__}: {cause}"
    dynamo.reset()
    return _fill_caches(task, expected, isas, why_not)


def fill_caches(payload: bytes) -> bytes:
    """Compile a pickled Task so that its results lie in torch's caches; gives a pickled Filled."""
    return _run(payload, lambda task, expected: _fill_caches(task, expected, dict(task.isas), None))


def _run(payload: bytes, compile_it: Callable[[Task, Collectives], Filled]) -> bytes:
    with events.recording():
        task = _begin(payload)
        expected = _expected(payload)
        if not task.settings.is_inductor:
            return pickle.dumps(compile_it(task, expected))
        with ledger.watching(inductor.cache_folder()) as note:
            try:
                filled = compile_it(task, expected)
            except Exception as cause:
                if dropped := note().dropped:  # torch may have raised it as another error
                    raise ledger.CorruptEntryError(f"{ledger.DAMAGED} {', '.join(dropped)}") from cause
                raise
            return pickle.dumps(replace(filled, kept=note(), sources=sources_here()))


def profile_region(payload: bytes) -> bytes:
    """Compile a pickled Task as if for the first time, with caches in the job's folder; gives the vector instructions found."""
    with events.recording() as folder:
        task = _begin(payload)
        if folder is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
            os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
        isas = dict(task.isas)
        _compile(task, isas)
    return pickle.dumps(isas)


def _expected(payload: bytes) -> Collectives:
    """The collectives that a call and its backward issue eagerly: of a copy of the program, as running it may change it."""
    if groups_here() is None:
        return Collectives()
    copied: Task = transport.loads(payload)
    return collectives_of(lambda: _backward(call_task(copied, entry_point(copied.is_block))))


def _begin(payload: bytes) -> Task:
    groups = transport.groups_of(payload)
    if groups is not None:
        pretend(groups)
    task: Task = transport.loads(payload)
    transformers.register(task.target)
    ambient.restore(task.ambient)
    if task.settings.is_inductor:
        check_compiler()
    return task


def _make_artifact(task: Task) -> bytes:
    with ambient.modes(task.ambient):
        artifact = precompile(task.target, task.args, task.kwargs, verify=False, report=Report())
    file = io.BytesIO()
    artifact.save(file)
    return file.getvalue()


def _fill_caches(task: Task, expected: Collectives, isas: dict[str, bool], why_not: str | None) -> Filled:
    """Compile for the example inputs, and run once: forward, and backward where gradients are wanted."""
    before = caching.counters()  # an attempt at an artifact was counted too
    refusals: list[str] = []
    with caching.noting_refusals(refusals):
        compiled = _compile(task, isas)
    not_verified = _check_ranks(task, compiled, expected) if expected else None
    counts = {name: count - before[name] for name, count in caching.counters().items()}
    if task.settings.is_inductor:
        _check_saved(counts, refusals)
    return Filled(counts["graphs"], isas, None, why_not, collectives=expected, not_verified=not_verified)


def _compile(task: Task, isas: dict[str, bool]) -> Callable[..., Any]:
    """Compile into torch's caches, and run once: forward, and backward where gradients are wanted; gives what was compiled."""
    compiled = task.settings.compile(entry_point(task.is_block))
    with caching.caching(), known_isas(isas):
        _backward(call_task(task, compiled))
    return compiled


def _check_ranks(task: Task, compiled: Callable[..., Any], expected: Collectives) -> str | None:
    """Compare compiled code with eager where it issues collectives, which send nothing here; why that cannot be done, or None.

    Raises:
        CompileError: it issues others than eager, so that a rank could not go back to eager alone, or gives other results.
    """
    eager, code = entry_point(task.is_block), dynamo.run(compiled)
    actual = collectives_of(lambda: _backward(call_task(task, code)))
    if actual.issued != expected.issued:
        raise CompileError(f"compiled code issues other collectives than eager ({actual}; eager: {expected})")
    call = task.target, task.args, task.kwargs
    is_random = task.settings.is_random
    _fill_blanks(call)
    try:
        with ambient.modes(task.ambient), portable_groups():
            wrong = verify.mismatch(eager, code, call, is_random=is_random, is_apart=True)
            if wrong is not None and verify.mismatch(eager, eager, call, is_random=is_random, is_apart=True) is not None:
                return "a fake collective does not fill its results, so that two runs of eager differ"
    except Exception as cause:  # noqa: BLE001 - the program's own, on numbers that it does not know, or of the check
        return f"{type(cause).__name__}: {cause}"
    if wrong is not None:
        raise CompileError(f"compiled code gives other results than eager: {wrong}")
    return None


def _fill_blanks(call: tuple[Any, tuple[Any, ...], Mapping[str, Any]]) -> None:
    """Fill weights and inputs that arrived as zeros, so that comparing results means something."""
    target, args, kwargs = call
    weights = list(target.parameters()) if isinstance(target, torch.nn.Module) else []
    with torch.no_grad():
        for tensor in [*weights, *tensors((args, kwargs))]:
            local = getattr(tensor, "_local_tensor", tensor).detach()
            if local.is_floating_point() and not local.is_meta and not local.any():
                local.uniform_(-0.5, 0.5)


def call_task(task: Task, entry: Callable[..., Any]) -> Any:
    """Call `entry` as the task's caller would: with its inputs and modes, its dimensions marked, its classes nested."""
    with ambient.modes(task.ambient), breaking_at_old_collectives():
        with marked(task.args, task.kwargs, task.dims), nesting(task.nested):
            return entry(task.target, *task.args, **task.kwargs)


def check_compiler() -> None:
    """Raise CompileError unless there is a C++ compiler for inductor's CPU kernels."""
    names = inductor.cxx_names()
    if not any(shutil.which(name) for name in names):
        raise CompileError(f"no C++ compiler: inductor looked for {', '.join(names)}; install g++ or set CXX")


def _backward(outputs: Any) -> None:
    """Run a backward through every output that has one, with zeros."""
    differentiable = [output for output in tensors(outputs) if output.requires_grad and output.grad_fn is not None]
    if differentiable:
        torch.autograd.backward(differentiable, [torch.zeros_like(output) for output in differentiable])


def _check_saved(counts: Mapping[str, int], refusals: Sequence[str]) -> None:
    num_cached = counts["saved"] + counts["hits"]
    if num_cached < counts["graphs"]:
        why = f": {refusals[0]}" if refusals else ""
        raise CompileError(f"torch's caches took {num_cached} of {counts['graphs']} graphs, so they cannot be handed over{why}")


def call_function(payload: bytes) -> bytes:
    """Call a function with arguments, both sent by :mod:`torchspan.jobs.transport`; gives its pickled result."""
    function, args = transport.loads(payload)
    return pickle.dumps(function(*args))
