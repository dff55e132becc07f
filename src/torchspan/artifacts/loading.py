"""Load: from an artifact's file to a callable, in a process that traces and compiles nothing."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from torchspan.artifacts.checker import Checker
from torchspan.artifacts.checks import Failed
from torchspan.artifacts.container import Store
from torchspan.artifacts.entry import Entry
from torchspan.artifacts.instructions import Library, Runner
from torchspan.artifacts.manifest import check_manifest, values_of
from torchspan.core.collector import collecting_later
from torchspan.core.compiled import Compiled
from torchspan.core.errors import (
    ArtifactError,
    GuardError,
    InputError,
    IntegrityError,
    ManifestMismatchError,
    TorchspanError,
    UnsupportedError,
)
from torchspan.core.report import Attempt, Report, current_report

if TYPE_CHECKING:
    from torchspan.artifacts.signing import Key


def load(
    path: str | os.PathLike[str] | BinaryIO,
    model: Callable[..., Any],
    *,
    trusted_keys: Sequence[Key] | None = None,
    weights: bool = False,
    report: Report | None = None,
) -> Compiled:
    """A callable that does what `model` does, from the artifact at `path`; traces and compiles nothing, imports no dynamo.

    The manifest is read and compared first: torch, Python, platform, instruction sets, the code of the model's classes, names,
    shapes and dtypes of its parameters and buffers. Then every payload's digest; only then are payloads opened. Nothing is
    unpickled.
    The callable takes the weights from `model`, by name, at every call.

    At every call the guards are checked: of inputs and parameters type, shape, strides, dtype, device and requires_grad; every
    attribute, global and container that the program read; the code of functions that it called; hooks, its own and global ones;
    grad mode (unless the graph is the same with and without gradients), inference mode, autocast, default dtype and device,
    determinism, and modes of torch_function and torch_dispatch. Checked once, here: the code of the model's classes, and
    torch's own functions. Guarded beyond what dynamo guards: names and keys that the program asked for and did not find (of the
    environment too), and constants that it returns without reading. An object that the program returns and did not create is
    returned as it is.
    Not checked: methods that are replaced on a class after loading (``forward`` is), functions of torch that are replaced after
    it, and what C extensions do.

    Args:
        path: a file that `Artifact.save` wrote, or one that is open for reading, such as an ``io.BytesIO`` of its bytes.
        model: the module (or function) that it was made from: another instance, its own weights.
        trusted_keys: whose signature the artifact must have, see `Artifact.save`: secrets (bytes), Ed25519 keys; it is checked
            before anything else. None takes an unsigned artifact too.
        weights: copy the weights that the artifact has inside into `model`.
        report: where the load is recorded; a new Report by default.

    Returns:
        A Compiled: call it as the model is called. Gradients flow to the model's parameters.

    Raises:
        InputError: there is no such file, or no weights inside.
        UntrustedError: none of the trusted keys signed it.
        IntegrityError: the file is not what was written.
        ManifestMismatchError: it was made for something else; names the entries that differ.
        GuardError: raised by calls that the artifact was not made for; names the guard.
    """
    if not callable(model):
        raise InputError(f"an artifact is loaded for a module or a function, not for a {type(model).__name__}")
    report = report or Report(parent=current_report())
    start = time.perf_counter()
    with Store(path) as store:
        if trusted_keys is not None:
            from torchspan.artifacts.signing import check as check_signature

            check_signature(store.manifest_bytes, store.signature, trusted_keys)
        check_manifest(store.manifest, model)
        payloads = store.payloads()
        manifest = store.manifest
    with collecting_later():
        entries = load_entries(manifest, payloads, model)
    if weights:
        from torchspan.artifacts.weights import read_weights

        read_weights(payloads, model)
    seconds = time.perf_counter() - start
    name = str(values_of(manifest)["model"])
    report.attempt(Attempt("artifact", name, str(values_of(manifest)["compiler"]), "loaded", seconds))
    return Compiled(Dispatcher(model, entries, str(store.path)), report)


def load_entries(manifest: Mapping[str, Any], payloads: Mapping[str, bytes], model: Callable[..., Any]) -> list[Entry]:
    """The entries of an artifact whose digests hold, ready to run."""
    with TemporaryDirectory(prefix="torchspan-") as folder:  # a library may be deleted once it is mapped
        try:
            return [_load_entry(program, payloads, Path(folder), model) for program in manifest["programs"]]
        except TorchspanError:
            raise
        except Exception as cause:  # any error that a forged value causes
            reason = f"{type(cause).__name__}: {cause}"
            raise IntegrityError(f"the artifact holds data that torchspan does not write ({reason})") from cause


def _load_entry(program: Mapping[str, Any], payloads: Mapping[str, bytes], folder: Path, model: Callable[..., Any]) -> Entry:
    plan = json.loads(payloads[program["plan"]])
    guards = json.loads(payloads[program["guards"]])
    forward, backward = open_runners(plan, program, payloads, folder)
    _check_once(guards, model)
    checker = Checker(
        guards["always"], guards["same"], guards["ambient"], guards["inputs"], plan["mutated"], guards.get("sizes")
    )
    try:
        return Entry(plan, checker, forward, backward)
    except LookupError as cause:
        raise ManifestMismatchError(f"the artifact does not fit here: {cause}") from cause


def open_runners(
    plan: Mapping[str, Any], program: Mapping[str, Any], payloads: Mapping[str, bytes], folder: Path
) -> tuple[Runner, Runner | None]:
    """What runs the forward, and the backward if there is one; libraries are written into `folder` on the way."""
    libraries = {name: _open_library(payloads, name, folder) for name in program["libraries"]}
    constants = _read_tensors(payloads[program["constants"]]) if program["constants"] else {}

    def runner(part: str) -> Runner:
        constants_of_part = {
            name.partition("/")[2]: tensor for name, tensor in constants.items() if name.startswith(f"{part}/")
        }
        return Runner(plan[part], libraries, constants_of_part)

    return runner("forward"), None if plan["backward"] is None else runner("backward")


def _check_once(guards: Mapping[str, Any], model: Callable[..., Any]) -> None:
    """What is checked at load only: torch's own functions, and what the program read that no call can change."""
    checker = Checker(guards["at_load"], [], {}, [])
    try:
        checker.check(model)
    except Failed as cause:
        raise ManifestMismatchError(f"the artifact does not fit here: {cause}. Rebuild it with this code") from cause


def _open_library(payloads: Mapping[str, bytes], name: str, folder: Path) -> Library:
    path = folder / name.replace("/", "_")
    path.write_bytes(payloads[name])
    description = name.removesuffix(".so") + ".json"
    if description in payloads:
        path.with_suffix(".json").write_bytes(payloads[description])
    try:
        return _Library(torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1))
    except RuntimeError as cause:
        is_barred = "failed to map segment" in str(cause)
        advice = f"; if {folder.parent} is mounted noexec, set TMPDIR to a folder that is not" if is_barred else ""
        raise ArtifactError(f"the library {name!r} of the artifact cannot be loaded here: {cause}{advice}") from cause


class _Library:
    """A native library of a graph."""

    def __init__(self, runner: Any) -> None:
        self._run = runner.run

    def __call__(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return self._run(inputs)


def _read_tensors(data: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load as load_tensors

    return load_tensors(data)


class Dispatcher:
    """Calls the first of `entries` whose guards hold."""

    def __init__(self, model: Callable[..., Any], entries: Sequence[Entry], origin: str) -> None:
        self._model = model
        self.entries = tuple(entries)
        self._origin = origin

    def __reduce__(self) -> Any:
        raise UnsupportedError(f"what was loaded from {self._origin} cannot be copied or sent; load it again there")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        failures = []
        for entry in self.entries:
            try:
                return entry.call(self._model, args, kwargs)
            except Failed as cause:
                failures.append(str(cause))
        raise GuardError(
            f"no entry of {self._origin} is for this call: {'; or '.join(failures)}. Add an entry for it, or call the model"
        )
