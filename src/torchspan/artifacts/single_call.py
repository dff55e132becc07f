"""``torch.compiler.precompile`` over torchspan's artifacts, for a torch that lacks it: its ``capture``.

The first of the two files is an artifact like any other, whose program is a whole call: its inputs are found among the call's
arguments, its results are the call's result and the gradients that the call leaves at parameters. The second file holds the
digest of the first. Nothing in either is executed as Python or unpickled.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch

from torchspan.artifacts.artifact import Artifact
from torchspan.artifacts.call_guards import call_guards
from torchspan.artifacts.manifest import making_entries, model_entries, read_manifest
from torchspan.artifacts.paths import encode_path, parse_path
from torchspan.artifacts.single_call_interface import Capture, MakeFxTracer, PrecompileError
from torchspan.artifacts.single_call_loading import KIND, as_precompile_error, record, runnable_of, write_pair
from torchspan.capture.call import CapturedCall, capture_call
from torchspan.capture.dynamo import Frame, Guards
from torchspan.core.errors import InputError, TorchspanError
from torchspan.core.program import Program
from torchspan.core.report import Report, current_report
from torchspan.private import fx

if TYPE_CHECKING:
    from typing_extensions import Self

_BACKENDS = ("inductor", "eager")
_SPENT = "this capture is over: its block has been left; call capture() again for another"


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
            raise PrecompileError("this capture has its one call already; start another with capture()")
        self._called, started = True, time.perf_counter()
        with as_precompile_error():
            artifact = _compile_call(self._function, args, self._compiler, self._decompositions)
            record(artifact.entries, "compiled", started)
            result = runnable_of(read_manifest(artifact.manifest()), artifact.payloads, str(self._path))(*args)
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
            write_pair(self._path, self._pair)
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
        "kind": KIND,
        "model": program.name,
        "code": described["code"],
        "state": {},
        "tied": [],
        "torchspan": __version__,
        "compiler": compiler,
        "passes": [],
        "config": {},
        "gradients": [encode_path(parse_path(source)) for source in call.gradients],
        "rebuild": f"run the program that calls {KIND}.capture",
    }


def _refuse_changed_parameters(call: CapturedCall, plan: Mapping[str, Any]) -> None:
    changed = [call.sources[index] for index in plan["mutated"] if index < call.num_parameters]
    if changed:
        raise PrecompileError(
            f"the call changes parameters in place ({', '.join(changed[:3])}), as an optimizer's step does; they may have been "
            "changed once already. Step outside of the captured function"
        )
