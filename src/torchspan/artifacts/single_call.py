"""``torch.compiler.precompile`` over torchspan's artifacts: its ``capture`` and ``load``, for a torch that lacks them.

The first of the two files is an artifact like any other, whose program is a whole call: its inputs are found among the call's
arguments, its results are the call's result and the gradients that the call leaves at parameters. The second file holds the
digest of the first. Nothing in either is executed as Python or unpickled.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from torchspan.artifacts.artifact import Artifact
from torchspan.artifacts.call_guards import call_guards
from torchspan.artifacts.checks import Failed
from torchspan.artifacts.container import Store
from torchspan.artifacts.entry import Entry
from torchspan.artifacts.loading import load_entries
from torchspan.artifacts.manifest import making_entries, mismatches, model_entries, platform_entries, read_manifest, values_of
from torchspan.artifacts.paths import decode_path, encode_path, follow, parse_path
from torchspan.capture.call import CapturedCall, capture_call
from torchspan.capture.dynamo import Frame, Guards
from torchspan.core.errors import GuardError, InputError, IntegrityError, TorchspanError, UnsupportedError
from torchspan.core.files import write_whole
from torchspan.core.program import Program
from torchspan.core.report import Attempt, Report, current_report
from torchspan.private import fx

if TYPE_CHECKING:
    from typing_extensions import Self

log = logging.getLogger("torchspan")

_KIND = "torch.compiler.precompile"
_BACKENDS = ("inductor", "eager")
_SPENT = "this capture is over: its block has been left; call capture() again for another"


class PrecompileError(TorchspanError, RuntimeError):
    """What ``torch.compiler.precompile`` and its artifacts raise.

    >>> load("no.py", "no.cache")
    Traceback (most recent call last):
    torch.compiler.PrecompileError: no artifact 'no.py'; torch.compiler.precompile.capture writes one
    """

    __module__ = "torch.compiler"


class CallMismatchError(PrecompileError, GuardError):
    """An artifact was called with what it was not captured for; the message names the guard."""


@contextmanager
def _told_as_ours() -> Iterator[None]:
    """What artifacts and captures raise, as the error that programs for ``torch.compiler.precompile`` expect."""
    try:
        yield
    except (PrecompileError, UnsupportedError):
        raise
    except TorchspanError as cause:
        raise PrecompileError(str(cause)) from cause


# what a program sees


@dataclass(frozen=True)
class MakeFxTracer:
    """How a call is captured: once, by make_fx, which records the operators of that one run.

    `decompositions` is a table of decompositions, as ``make_fx`` takes it.
    """

    decompositions: dict[Any, Any] | None = None


class PrecompiledRunnable:
    """What `load` returns: called as the captured function was; as a context manager, and to ``unload``, it does nothing.

    ``installed`` says whether something of the process was changed: never.
    """

    installed: bool = False

    def __call__(self, *args: object, **kwargs: object) -> object:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.unload()

    def unload(self) -> None:
        """Take back what was installed: nothing."""


@dataclass(frozen=True, kw_only=True)
class PrecompileSummary:
    """What a capture covered: numbers of frames and graphs, frames that it could not serve, guards that it kept and dropped.

    A capture of one call gives none, here as in torch, where it is for captures of many.
    """

    frames: int
    resume_functions: int
    guarded_codes: int
    backend_graphs: int
    bypassed: tuple[str, ...] = ()
    truncated: tuple[str, ...] = ()
    uncovered_frames: tuple[str, ...] = ()
    wont_generalize: tuple[str, ...] = ()
    dropped_guards: tuple[tuple[str, str], ...] = ()
    kept_guards: tuple[tuple[str, str], ...] = ()
    risky_dropped_guards: tuple[tuple[str, str], ...] = ()
    policy_dropped_guards: tuple[tuple[str, str], ...] = ()
    dropped_guard_code: tuple[tuple[str, str, str], ...] = ()
    capture_errors: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether everything that ran was captured, and something was."""
        missed = (self.bypassed, self.truncated, self.uncovered_frames, self.capture_errors)
        return not any(missed) and self.guarded_codes > 0 and self.backend_graphs > 0

    @property
    def dropped_guard_types(self) -> dict[str, int]:
        """How many guards of each kind were dropped."""
        return dict(Counter(kind for kind, _ in self.dropped_guards))

    @property
    def kept_guard_types(self) -> dict[str, int]:
        """How many guards of each kind were kept."""
        return dict(Counter(kind for kind, _ in self.kept_guards))


class Capture:
    """What `capture` returns: a context manager, called once inside its block, whose two files are written at its end."""

    def __enter__(self) -> Self:
        raise NotImplementedError

    def __exit__(self, *exc: object) -> None:
        raise NotImplementedError

    def __call__(self, *args: object, **kwargs: object) -> object:
        raise NotImplementedError

    def save(self) -> None:
        """Write the files now, without ending the capture."""
        raise NotImplementedError


def capture(
    fn: Callable[..., object],
    /,
    *,
    artifact_path: str | os.PathLike[str],
    cache_path: str | os.PathLike[str],
    tracer: MakeFxTracer = MakeFxTracer(),  # noqa: B008  a frozen value; the signature is torch's
    backend: str = "inductor",
) -> Capture:
    """Capture the one call of `fn` that is made inside of the block, and write the two files when the block is left.

    Args:
        fn: the whole computation, such as ``lambda model, x: model(x)``, or a step with its ``loss.backward()``.
        artifact_path: the file of the artifact; its folder is made.
        cache_path: the file of the artifact's digest.
        tracer: with a decomposition table, if any.
        backend: ``inductor``, or ``eager``, which runs the captured operators one by one.

    Raises:
        TypeError, ValueError: another tracer, another backend.
        PrecompileError: raised by the capture: no call or a second one, a tensor that was not given.
        UnsupportedError: raised by the call: what an artifact cannot hold.
    """
    if isinstance(fn, functools.partial):
        raise TypeError(
            "capture takes the function itself, not a functools.partial: pass what is bound as arguments of the call"
        )
    if not isinstance(tracer, MakeFxTracer):
        raise TypeError(f"tracer must be a MakeFxTracer, got {type(tracer).__name__}")
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(_BACKENDS)}, got {backend!r}")
    return _OneCall(fn, Path(artifact_path), Path(cache_path), backend, tracer.decompositions)


def load(artifact_path: str | os.PathLike[str], cache_path: str | os.PathLike[str]) -> PrecompiledRunnable:
    """A callable of what the captured function took, from the two files that `capture` wrote.

    Raises:
        PrecompileError: a file is missing or is not as it was written, the two are not of one capture, or they were made for
            another torch or machine.
    """
    path, started = Path(artifact_path), time.perf_counter()
    _check_pair(path, Path(cache_path))
    with _told_as_ours(), Store(path) as store:
        manifest = store.manifest
        if values_of(manifest).get("kind") != _KIND:
            raise PrecompileError(f"{path} was not written by {_KIND}.capture; torchspan.load takes other artifacts")
        differ = mismatches(manifest, platform_entries())
        if differ:
            differences = "; ".join(f"entry {name!r}: {how}" for name, how in differ.items())
            raise PrecompileError(f"{path} does not fit here: {differences}; capture it again")
        runnable = _runnable(manifest, store.payloads(), str(path))
    _record(values_of(manifest), "loaded", started)
    return runnable


def _record(entries: Mapping[str, Any], outcome: Literal["loaded", "compiled"], started: float) -> None:
    report = current_report()
    if report is not None:
        seconds = time.perf_counter() - started
        report.attempt(Attempt("artifact", str(entries["model"]), str(entries["compiler"]), outcome, seconds))


# capturing


class _OneCall(Capture):
    """A capture of one call."""

    def __init__(
        self, function: Callable[..., object], path: Path, pair: Path, compiler: str, decompositions: Mapping[Any, Any] | None
    ) -> None:
        self._function, self._path, self._pair = function, path, pair
        self._compiler, self._decompositions = compiler, decompositions
        self._state = "new"
        self._called = False
        self._artifact: Artifact | None = None

    def __enter__(self) -> Self:
        if self._state != "new":
            raise PrecompileError(
                _SPENT if self._state == "over" else "this capture was entered before; capture() makes another"
            )
        self._state = "open"
        return self

    def __exit__(self, *exc: object) -> None:
        self._state = "over"
        if exc[0] is None:
            self._write()

    def save(self) -> None:
        self._need_open("save")
        self._write()

    def __call__(self, *args: object, **kwargs: object) -> object:
        self._need_open("call")
        if kwargs:
            raise ValueError(
                f"a captured call takes positional arguments only, not {sorted(kwargs)}; load's callable does, too"
            )
        if self._artifact is not None:
            raise PrecompileError("one call has been captured already, and a capture is of one; start another with capture()")
        self._called, started = True, time.perf_counter()
        with _told_as_ours():
            artifact = _compile_call(self._function, args, self._compiler, self._decompositions)
            _record(artifact.entries, "compiled", started)
            result = _runnable(read_manifest(artifact.manifest()), artifact.payloads, str(self._path))(*args)
        self._artifact = artifact
        return result

    def _need_open(self, verb: str) -> None:
        if self._state != "open":
            raise PrecompileError(
                _SPENT if self._state == "over" else f"this capture is not open; {verb} it inside its with block"
            )

    def _write(self) -> None:
        if self._artifact is None:
            why = "its call raised" if self._called else "call the capture with example arguments inside the with block"
            raise PrecompileError(f"nothing was captured: {why}")
        try:
            for path in (self._path, self._pair):
                path.parent.mkdir(parents=True, exist_ok=True)
            self._artifact.save(self._path)
            _write_pair(self._path, self._pair)
        except (OSError, InputError) as cause:
            raise PrecompileError(f"the artifact cannot be written: {cause}") from cause


def _compile_call(
    function: Callable[..., object], args: tuple[object, ...], compiler: str, decompositions: Mapping[Any, Any] | None
) -> Artifact:
    """The artifact of one call."""
    from torchspan.artifacts.export import export_entry

    program = Program(function, args)
    report = Report(parent=current_report())
    call = capture_call(function, args, decompositions)
    guards = Guards(program, _frame(call), None)
    try:
        with torch._C._DisableAutocast():  # what it casts is in the captured operators
            parts = export_entry("entry0", call.module, guards, compiler, report)
    except TorchspanError:
        raise
    except Exception as cause:
        lines = str(cause).strip().splitlines() or [""]
        raise PrecompileError(f"the compiler failed on {program.name}: {type(cause).__name__}: {lines[0]}") from cause
    _refuse_changed_parameters(call, json.loads(parts.payloads[parts.program["plan"]]))
    parts.payloads[parts.program["guards"]] = json.dumps(call_guards(call, args, parts)).encode()
    return Artifact(_entries(program, call, compiler), [parts.program], parts.payloads, report)


def _call_graph(target: Any, args: Any, kwargs: Any) -> Any:
    return build_results(graph())  # type: ignore[name-defined]  # noqa: F821  names of the frame's scope


def _frame(call: CapturedCall) -> Frame:
    """What dynamo would have made of the call: the code that runs the graph, and where its inputs are."""

    num_gradients = len(call.gradients)

    def build(values: Sequence[Any]) -> Any:
        split = len(values) - num_gradients
        return call.build(values[:split]), list(values[split:])

    code: CodeType = _call_graph.__code__
    scope: dict[str, Any] = {"build_results": build, "graph": None}
    return Frame(
        module=call.module,
        bytecode=code,
        manager=None,
        guards=(),
        inputs=call.inputs,
        sources=call.sources,
        scope=scope,
        graph_name="graph",
        context=fx.new_tracing_context(),
        changes=(),
        traced=(),
        grad_mode=False,
    )


def _entries(program: Program, call: CapturedCall, compiler: str) -> dict[str, Any]:
    from torchspan import __version__

    described = model_entries(program.target)
    return {
        **making_entries(),
        "kind": _KIND,
        "model": program.name,
        "code": described["code"],
        "state": {},
        "tied": [],
        "torchspan": __version__,
        "compiler": compiler,
        "passes": [],
        "config": {},
        "gradients": [encode_path(parse_path(source)) for source in call.gradients],
        "rebuild": f"run the program that calls {_KIND}.capture",
    }


def _refuse_changed_parameters(call: CapturedCall, plan: Mapping[str, Any]) -> None:
    changed = [call.sources[index] for index in plan["mutated"] if index < call.num_parameters]
    if changed:
        raise PrecompileError(
            f"the call changes parameters in place ({', '.join(changed[:3])}), as an optimizer's step does; they may have been "
            "changed once already. Step outside of the captured function"
        )


# running


class _Runnable(PrecompiledRunnable):
    """An entry that is given everything with each call."""

    def __init__(self, entry: Entry, gradients: Sequence[Any], origin: str) -> None:
        self._entry = entry
        self._gradients = [decode_path(path) for path in gradients]
        self._origin = origin

    def __call__(self, *args: object, **kwargs: object) -> object:
        if kwargs:
            raise TypeError(f"{self._origin} takes the positional arguments that were captured, not {sorted(kwargs)}")
        try:
            result, gradients = self._entry.call(None, args, {})
        except Failed as cause:
            raise CallMismatchError(f"{self._origin} is not for this call: {cause}; capture such a call") from None
        for path, gradient in zip(self._gradients, gradients, strict=True):
            _accumulate(follow(path, {"args": args}), gradient)
        return result


def _accumulate(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        with torch.no_grad():
            parameter.grad.add_(gradient)


def _runnable(manifest: Mapping[str, Any], payloads: Mapping[str, bytes], origin: str) -> PrecompiledRunnable:
    entries = load_entries(manifest, payloads, nn.Module())
    try:
        gradients = values_of(manifest)["gradients"]
        _, result = json.loads(payloads[manifest["programs"][0]["plan"]])["result"]["tuple"]
        is_right = len(result["list"]) == len(gradients) and all(map(_is_parameter, gradients)) and len(entries) == 1
    except (TypeError, LookupError, ValueError):
        is_right = False
    if not is_right:
        raise IntegrityError(f"{origin} holds gradients that are of no parameters; capture it again")
    return _Runnable(entries[0], gradients, origin)


def _is_parameter(path: Any) -> bool:
    """Whether a path leads to a parameter of a module among the arguments, by nothing but names."""
    steps = decode_path(path)
    attributes = [key for kind, key in steps if kind == "attr"]
    is_by_name = {kind for kind, _ in steps[1:]} == {"attr", "item"} and {*attributes} <= {"_modules", "_parameters"}
    return steps[0] == ("local", "args") and is_by_name and steps[-2] == ("attr", "_parameters")


# the two files


def _write_pair(path: Path, pair: Path) -> None:
    written = json.dumps({"format": _KIND, "artifact_sha256": _digest(path)}).encode()
    write_whole(pair, written)


def _check_pair(path: Path, pair: Path) -> None:
    """Raise PrecompileError unless both files are there and of one capture; a second file that says nothing is let pass."""
    for file in (path, pair):
        if not file.is_file():
            raise PrecompileError(f"no artifact {str(file)!r}; {_KIND}.capture writes one")
    try:
        stated = json.loads(pair.read_bytes())["artifact_sha256"]
    except (ValueError, KeyError, TypeError):
        log.warning(
            "%s is not what torch.compiler.precompile.capture writes beside an artifact; %s is loaded without", pair, path
        )
        return
    if stated != _digest(path):
        raise PrecompileError(f"{path} and {pair} are not of one capture; load the two files that were written together")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
