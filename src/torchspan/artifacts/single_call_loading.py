"""Loading of a captured call: the artifact, the second file with its digest, and the callable that both give."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from torchspan.artifacts.checks import Failed
from torchspan.artifacts.container import Store
from torchspan.artifacts.entry import Entry
from torchspan.artifacts.loading import load_entries
from torchspan.artifacts.manifest import mismatches, platform_entries, values_of
from torchspan.artifacts.paths import decode_path, follow
from torchspan.artifacts.single_call_interface import CallMismatchError, PrecompiledRunnable, PrecompileError
from torchspan.core.errors import IntegrityError, TorchspanError, UnsupportedError
from torchspan.core.files import write_whole
from torchspan.core.report import Attempt, current_report

log = logging.getLogger("torchspan")

KIND = "torch.compiler.precompile"


@contextmanager
def as_precompile_error() -> Iterator[None]:
    """What artifacts and captures raise, as the error that programs for ``torch.compiler.precompile`` expect."""
    try:
        yield
    except (PrecompileError, UnsupportedError):
        raise
    except TorchspanError as cause:
        raise PrecompileError(str(cause)) from cause


def load(artifact_path: str | os.PathLike[str], cache_path: str | os.PathLike[str]) -> PrecompiledRunnable:
    """A callable of what the captured function took, from the two files that `capture` wrote.

    Raises:
        PrecompileError: a file is missing or is not as it was written, the two are not of one capture, or they were made for
            another torch or machine.
    """
    path, started = Path(artifact_path), time.perf_counter()
    _check_pair(path, Path(cache_path))
    with as_precompile_error(), Store(path) as store:
        manifest = store.manifest
        if values_of(manifest).get("kind") != KIND:
            raise PrecompileError(f"{path} was not written by {KIND}.capture; torchspan.load takes other artifacts")
        differ = mismatches(manifest, platform_entries())
        if differ:
            differences = "; ".join(f"entry {name!r}: {how}" for name, how in differ.items())
            raise PrecompileError(f"{path} does not fit here: {differences}; capture it again")
        runnable = runnable_of(manifest, store.payloads(), str(path))
    record(values_of(manifest), "loaded", started)
    return runnable


def record(entries: Mapping[str, Any], outcome: Literal["loaded", "compiled"], started: float) -> None:
    """Put the capture or the loading of an artifact, which began at `started`, on the report that is in force."""
    report = current_report()
    if report is not None:
        seconds = time.perf_counter() - started
        report.attempt(Attempt("artifact", str(entries["model"]), str(entries["compiler"]), outcome, seconds))


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


def runnable_of(manifest: Mapping[str, Any], payloads: Mapping[str, bytes], origin: str) -> PrecompiledRunnable:
    """The callable of an artifact whose digests hold; IntegrityError if `capture` cannot have written it."""
    entries = load_entries(manifest, payloads, nn.Module())
    try:
        gradients = values_of(manifest)["gradients"]
        _, result = json.loads(payloads[manifest["programs"][0]["plan"]])["result"]["tuple"]
        is_right = len(result["list"]) == len(gradients) and all(map(_is_parameter, gradients)) and len(entries) == 1
    except (TypeError, LookupError, ValueError):
        is_right = False
    if not is_right:
        raise IntegrityError(f"{origin} gives gradients to what is no parameter; capture it again")
    return _Runnable(entries[0], gradients, origin)


def _is_parameter(path: Any) -> bool:
    """Whether a path leads to a parameter of a module among the arguments, by nothing but names."""
    steps = decode_path(path)
    attributes = [key for kind, key in steps if kind == "attr"]
    is_by_name = {kind for kind, _ in steps[1:]} == {"attr", "item"} and {*attributes} <= {"_modules", "_parameters"}
    return steps[0] == ("local", "args") and is_by_name and steps[-2] == ("attr", "_parameters")


# the two files


def write_pair(path: Path, pair: Path) -> None:
    """Write the second file, `pair`, which holds the digest of the artifact at `path`."""
    written = json.dumps({"format": KIND, "artifact_sha256": _digest(path)}).encode()
    write_whole(pair, written)


def _check_pair(path: Path, pair: Path) -> None:
    """Raise PrecompileError unless both files are there and of one capture; a second file that says nothing is let pass."""
    for file in (path, pair):
        if not file.is_file():
            raise PrecompileError(f"no artifact {str(file)!r}; {KIND}.capture writes one")
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
