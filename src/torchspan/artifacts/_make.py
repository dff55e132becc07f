"""Precompile: capture once, compile once, and keep it: the two stages of ``torch.Precompile``, and artifacts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any, BinaryIO, overload

import torch
from torch.fx import GraphModule

from torchspan.artifacts import _torch
from torchspan.artifacts._dynamic import Marks, marked, marks_of, takes_keyword
from torchspan.artifacts._export import compiler_name, export_entry, pipeline_of
from torchspan.artifacts._manifest import making_entries, model_entries, write_manifest
from torchspan.artifacts._portable import portable_sizes
from torchspan.artifacts._sign import sign
from torchspan.artifacts._sizes import Sizes
from torchspan.artifacts._store import write_artifact, write_members
from torchspan.artifacts._verify import Parts
from torchspan.artifacts._weights import WEIGHTS, write_weights
from torchspan.capture.dynamo import Guards, capture_dynamo
from torchspan.core.errors import CompileError, InputError, TorchspanError
from torchspan.core.program import Program
from torchspan.core.report import Attempt, Report, current_report
from torchspan.passes._base import Pass
from torchspan.passes._pipeline import Pipeline

if TYPE_CHECKING:
    from torchspan.artifacts._sign import Key

Compiler = Callable[[GraphModule, Sequence[Any]], Any]


class Precompile:
    """Ahead-of-time compilation in two stages that can be stopped at and looked into: ``dynamo``, then ``aot_autograd``.

    >>> model = torch.nn.Linear(2, 3)
    >>> gm, bytecode, guards, inputs = Precompile.dynamo(model, torch.ones(1, 2))
    >>> compiled, guards = Precompile.aot_autograd(gm, guards, compiler=lambda graph, example_inputs: graph)
    >>> torch.equal(compiled(inputs), model(*inputs))
    True
    """

    @staticmethod
    def dynamo(
        model: Callable[..., Any], *example_inputs: Any, dynamic: Any = None, **example_kwargs: Any
    ) -> tuple[GraphModule, CodeType, Guards, tuple[Any, ...]]:
        """Trace a model into one FX graph, without running it.

        Args:
            model: a module or a function.
            example_inputs: its positional inputs; the graph is for their shapes, strides, dtypes and devices.
            dynamic: the dimensions that differ from call to call, as for `torchspan.precompile`; a model that has an input of
                this name gets it, and its dimensions are marked by ``torch._dynamo.mark_dynamic``.
            example_kwargs: its keyword inputs.

        Returns:
            The graph, whose placeholders are the parameters, buffers and inputs that it uses; the bytecode (``types.CodeType``)
            that dynamo wrote to fetch those, call the graph and make the result; the guards (iterable, ``holds``, ``check``);
            and the example inputs, as a tuple.

        Raises:
            CaptureError: the model is not one graph; names the file and line that stands in the way, and what to do.

        >>> gm, bytecode, guards, inputs = Precompile.dynamo(torch.nn.Linear(2, 3), torch.ones(1, 2))
        >>> [node.op for node in gm.graph.nodes]
        ['placeholder', 'placeholder', 'placeholder', 'call_function', 'output']
        """
        if dynamic is not None and takes_keyword(model, "dynamic"):
            dynamic, example_kwargs = None, {**example_kwargs, "dynamic": dynamic}
        program = Program(model, example_inputs, example_kwargs)
        with marked(marks_of(program, dynamic)):
            return capture_dynamo(program)

    @staticmethod
    def aot_autograd(gm: GraphModule, guards: Guards, compiler: Compiler | None = None) -> tuple[Callable[..., Any], Guards]:
        """Compile a graph that `dynamo` captured: forward and backward, each by `compiler`.

        Args:
            gm: the graph; it may have been transformed, if it takes and gives the same.
            guards: what `dynamo` returned beside it.
            compiler: ``(graph, example_inputs) -> callable`` over operator graphs, called for the forward and for the backward;
                None is inductor. ``torch.fx.passes.regional_inductor.regional_inductor`` compiles annotated regions only.

        Returns:
            A function of the tuple of inputs, as the model takes them, through which gradients flow to the model's parameters;
            and the guards, which it checks at every call.

        Raises:
            CompileError: the compiler failed; its own error is the cause.
            GuardError: raised by calls that the graph was not captured for; names the condition.

        >>> gm, _, guards, inputs = Precompile.dynamo(torch.nn.Linear(2, 3), torch.ones(1, 2))
        >>> compiled, _ = Precompile.aot_autograd(gm, guards, compiler=lambda graph, example_inputs: graph)
        >>> compiled((torch.ones(5, 2),))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        torchspan.core.errors.GuardError: the graph of Linear is not for this call: tensor ... expected 1, actual 5; ...
        """
        if not isinstance(guards, Guards):
            raise InputError(f"guards are what Precompile.dynamo returned, not a {type(guards).__name__}")
        frame = guards.frame
        with torch.set_grad_enabled(frame.grad_mode):
            graph = _foreign(lambda: _torch.compile_graph(gm, frame.inputs, frame.context, compiler), guards.program.name)
        sizes = Sizes(portable_sizes(guards))  # what compilers assumed of dynamic sizes, after the guards were made
        if sizes.names:
            guards.require(sizes.failed_for)
        return _Checked(guards, guards.bind(graph)), guards


def _foreign(compile_it: Callable[[], Any], name: str) -> Any:
    """What a compiler returns; what it raises, as a CompileError."""
    try:
        return compile_it()
    except TorchspanError:
        raise
    except Exception as cause:
        said = str(cause).strip().splitlines() or [""]
        raise CompileError(f"the compiler failed on {name}: {type(cause).__name__}: {said[0]}") from cause


class _Checked:
    """A compiled graph behind its guards; called with the tuple of inputs."""

    def __init__(self, guards: Guards, run: Callable[[tuple[Any, ...], Mapping[str, Any]], Any]) -> None:
        self.guards = guards
        self._run = run

    def __call__(self, inputs: tuple[Any, ...] | list[Any], **kwargs: Any) -> Any:
        if not isinstance(inputs, (tuple, list)):
            raise InputError(
                f"a precompiled function takes the tuple of inputs, not a {type(inputs).__name__}; write (x,) for one"
            )
        args = tuple(inputs)
        self.guards.check(args, kwargs)
        return self._run(args, kwargs)


# artifacts


@dataclass
class Artifact:
    """A compiled program that can be saved: what it stands on (`entries`), its `programs` and their `payloads`."""

    entries: dict[str, Any]
    programs: list[Mapping[str, Any]] = field(default_factory=list)
    payloads: dict[str, bytes] = field(repr=False, default_factory=dict)
    report: Report = field(repr=False, compare=False, default_factory=Report)
    pipeline: Pipeline = field(repr=False, compare=False, default_factory=Pipeline)
    verify: bool = field(repr=False, compare=False, default=True)

    def add(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        *,
        dynamic: Any = None,
    ) -> None:
        """Compile for other inputs too: at each call the first entry whose guards hold is taken.

        Args:
            model: what the artifact was made from, or an equal one (in ``eval()`` after ``train()``, say).
            args, kwargs: example inputs of another shape, dtype or structure.
            dynamic: as for `precompile`.

        Raises:
            InputError: the model is another one.
            CaptureError, UnsupportedError, CompileError: as for `precompile`.

        >>> linear = torch.nn.Linear(2, 3)
        >>> artifact = precompile(linear, (torch.ones(1, 2),), compiler="eager")
        >>> artifact.add(linear, (torch.ones(5, 2),))
        >>> len(artifact.programs)
        2
        """
        program = Program(model, args, {} if kwargs is None else kwargs)
        expected = model_entries(program.target)
        differ = [name for name, value in expected.items() if self.entries[name] != value]
        if differ:
            raise InputError(f"add takes the model that the artifact was made from; this one differs in: {', '.join(differ)}")
        self._add(program, dynamic)

    def _add(self, program: Program, dynamic: Any) -> None:
        compiler, prefix = self.entries["compiler"], f"entry{len(self.programs)}"
        started = time.perf_counter()
        marks = marks_of(program, dynamic)
        with marked(marks):
            module, _, guards, _ = capture_dynamo(program)
        captured = time.perf_counter()
        parts: Parts = _foreign(
            lambda: export_entry(prefix, module, guards, compiler, self.report, self.pipeline, self.verify), program.name
        )
        self.programs.append(parts.program)
        self.payloads.update(parts.payloads)
        self.entries["config"] = {
            **self.entries["config"],
            prefix: {"grad_modes": sorted(guards.managers), "training": guards.frame.grad_mode},
        }
        self.entries["format"] = max(self.entries["format"], parts.format)
        self.entries["rebuild"] = _rebuild(self.entries["rebuild"], program.args, marks)
        self.report.figure("capture_s", captured - started)
        self.report.attempt(Attempt("artifact", program.name, compiler, "compiled", time.perf_counter() - started))

    @overload
    def save(self, path: str | os.PathLike[str], *, key: Key | None = None) -> Path: ...

    @overload
    def save(self, path: BinaryIO, *, key: Key | None = None) -> None: ...

    def save(self, path: str | os.PathLike[str] | BinaryIO, *, key: Key | None = None) -> Path | None:
        """Write the artifact to one file, whole or not at all; an artifact that was there is replaced in one step.

        Args:
            path: the file, such as ``model.tspan``; or one that is open for writing, such as an ``io.BytesIO``, which one rank
                can send to the others.
            key: signs it: a secret of at least 16 bytes (HMAC), or an ``Ed25519PrivateKey`` of the package cryptography.

        Raises:
            InputError: there is no folder to write into, the path is none, or the key is none.
        """
        manifest = self.manifest()
        signature = None if key is None else sign(manifest, key)
        if not isinstance(path, (str, os.PathLike)):
            if not hasattr(path, "write"):
                raise InputError(f"an artifact is saved to a path or into an open file, not into a {type(path).__name__}")
            write_members(path, manifest, self.payloads, signature)
            return None
        write_artifact(Path(path), manifest, self.payloads, signature)
        return Path(path)

    def manifest(self) -> bytes:
        """The manifest: every entry and payload with its digest, as JSON."""
        return write_manifest(self.entries, self.payloads, [dict(program) for program in self.programs])


def precompile(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    compiler: str | Compiler | None = None,
    passes: str | Sequence[Pass | Callable[[GraphModule], GraphModule | None]] = (),
    dynamic: Any = None,
    weights: bool = False,
    verify: bool = True,
    report: Report | None = None,
) -> Artifact:
    """Compile `model` for inputs like `args` into an Artifact, forward and backward; weights stay outside unless asked for.

    It is compiled for the grad mode of the caller: with gradients on, the forward keeps what the backward needs; it may also be
    called without, if the program does the same in both.

    Args:
        model: a module or a function, on a CPU.
        args: example inputs; shapes are static, except for `dynamic` and what ``torch._dynamo.mark_dynamic`` marked.
        kwargs: example keyword inputs.
        dynamic: the dimensions that differ from call to call. A mapping by position or name of the inputs (or a sequence),
            nested as they are; for a tensor from dimension to a name, ``(min, max)``, True or a ``torch.export.Dim``. True is
            every dimension that the program leaves free. Examples of dynamic sizes are 2 or more; what the program and the
            compiler assume of sizes becomes a guard.
        passes: changes to the operator graphs of forward and of backward, each, before they are compiled: a pipeline as text
            ('torchspan passes' lists passes), or passes and functions of a GraphModule, which return one or change it in place.
        compiler: ``inductor`` (the default: each graph is one native library), ``regional_inductor`` (annotated regions are
            native, the rest runs operator by operator; the function of that name says the same), or ``eager`` (nothing is
            native).
        weights: have the model's parameters and buffers inside too, as safetensors; `torchspan.load` gives them on request.
        verify: run what was compiled, forward and backward, beside its operators on the example inputs: a compiler that gets a
            number wrong (those of torch 2.8 and 2.13 do, rarely) is a CompileError.
        report: where decisions and the attempt are recorded; a new Report by default.

    Returns:
        An Artifact; ``add`` other inputs, ``save`` it, and `torchspan.load` it in any process of this torch on such a machine.

    Raises:
        CaptureError: the model is not one graph; names the user's file and line.
        UnsupportedError: it is, and an artifact cannot hold it (changes to Python objects, subclasses, a dimension that cannot
            be dynamic, …).
        InputError: `dynamic` or `passes` name what is not there.
        PassError: a pass failed, or gave back a graph that is not valid.
        CompileError: the compiler failed, or what it made gives other numbers than the operators.

    >>> artifact = precompile(torch.nn.Linear(2, 3), (torch.ones(1, 2),), compiler="eager")
    >>> sorted(artifact.payloads)
    ['entry0/guards.json', 'entry0/plan.json']
    """
    program = Program(model, args, {} if kwargs is None else kwargs)
    pipeline = pipeline_of(passes)
    entries = {**_entries(program, compiler_name(compiler)), "passes": [str(one) for one in pipeline.passes]}
    if entries["passes"]:
        entries["rebuild"] += f" --passes '{pipeline}'"
    report = report or Report(parent=current_report())
    artifact = Artifact(entries, report=report, pipeline=pipeline, verify=verify)
    artifact._add(program, dynamic)
    if weights:
        artifact.payloads[WEIGHTS] = write_weights(program.target)
    return artifact


def _entries(program: Program, compiler: str) -> dict[str, Any]:
    from torchspan import __version__

    return {
        **making_entries(),
        **model_entries(program.target),
        "torchspan": __version__,
        "compiler": compiler,
        "config": {},
        "rebuild": f"torchspan precompile module:factory --compiler {compiler} -o FILE",
    }


def _rebuild(command: str, args: tuple[Any, ...], marks: Marks) -> str:
    """The command that makes the artifact again, for one entry more."""
    return command.replace(" --compiler", f" --inputs '{_inputs_text(args, marks)}' --compiler", 1)


def _inputs_text(args: tuple[Any, ...], marks: Marks) -> str:
    dynamic = {id(tensor): dims for tensor, dims in marks}
    texts = []
    for number, tensor in enumerate(value for value in args if isinstance(value, torch.Tensor)):
        dims = dynamic.get(id(tensor), {})
        sizes = [f"d{number}_{dim}={size}" if dim in dims else str(size) for dim, size in enumerate(tensor.shape)]
        texts.append(f"{str(tensor.dtype).removeprefix('torch.')}[{','.join(sizes)}]")
    return ",".join(texts)
