"""Precompile: capture once, compile once, and keep it: the two stages of ``torch.Precompile``, and artifacts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, overload

import torch
from torch.fx import GraphModule

from torchspan.artifacts.container import write_artifact, write_members
from torchspan.artifacts.dynamic_marks import Marks, marked, marks_of
from torchspan.artifacts.export import compiler_name, export_entry, pipeline_of
from torchspan.artifacts.manifest import making_entries, model_entries, write_manifest
from torchspan.artifacts.numbers_check import Parts
from torchspan.artifacts.signing import sign
from torchspan.artifacts.weights import WEIGHTS, write_weights
from torchspan.capture.dynamo import capture_dynamo
from torchspan.core.errors import InputError
from torchspan.core.program import Program
from torchspan.core.report import Attempt, Report, current_report
from torchspan.passes._base import Pass
from torchspan.passes._pipeline import Pipeline

if TYPE_CHECKING:
    from torchspan.artifacts.signing import Key
from torchspan.artifacts.two_stages import Compiler, naming_the_compiler

# artifacts


@dataclass
class Artifact:
    """A compiled program that can be saved: what it depends on (`entries`), its `programs` and their `payloads`."""

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
        parts: Parts = naming_the_compiler(
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
            every dimension whose size the program does not fix. Examples of dynamic sizes are 2 or more; what the program and
            the compiler assume of sizes becomes a guard.
        passes: changes to the operator graphs of forward and of backward, each, before they are compiled: a pipeline as text
            ('torchspan passes' lists passes), or passes and functions of a GraphModule, which return one or change it in place.
        compiler: ``inductor`` (the default: each graph is one native library), ``regional_inductor`` (annotated regions are
            native, the rest runs operator by operator; the function of that name says the same), or ``eager`` (nothing is
            native).
        weights: store the model's parameters and buffers too, as safetensors; ``torchspan.load(…, weights=True)`` copies them
            into a model.
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
    entries = {**_entries(program, compiler_name(compiler)), "passes": [str(pass_) for pass_ in pipeline.passes]}
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
    """The command that makes the artifact again, with one entry more."""
    return command.replace(" --compiler", f" --inputs '{_inputs_text(args, marks)}' --compiler", 1)


def _inputs_text(args: tuple[Any, ...], marks: Marks) -> str:
    dynamic = {id(tensor): dims for tensor, dims in marks}
    texts = []
    for number, tensor in enumerate(value for value in args if isinstance(value, torch.Tensor)):
        dims = dynamic.get(id(tensor), {})
        sizes = [f"d{number}_{dim}={size}" if dim in dims else str(size) for dim, size in enumerate(tensor.shape)]
        texts.append(f"{str(tensor.dtype).removeprefix('torch.')}[{','.join(sizes)}]")
    return ",".join(texts)
