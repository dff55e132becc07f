"""Manifest: the named, digested preconditions of an artifact, read and checked before anything else in it is opened."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from torchspan.artifacts.code_digest import digest_class, digest_function
from torchspan.artifacts.values import name_of
from torchspan.core.errors import IntegrityError, ManifestMismatchError

FORMAT = 1
FORMAT_DYNAMIC = 2  # as 1, and sizes that are expressions: who knows only 1 must refuse it
FORMAT_OBJECTS = 3  # as 2, and objects: those that a call stores on, and those that it makes

# Instruction sets that a compiler asked for this machine's may use: a library runs where all of those it was made with are.
_X86 = ("sse", "ssse", "avx", "fma", "f16c", "bmi", "amx", "popcnt", "abm", "adx", "aes", "vaes", "pclmul", "vpclmul", "gfni")
_X86_ELSE = ("sha", "movbe", "rdrand", "rdseed", "xsave", "fsgsbase")
_ARM = ("asimd", "neon", "sve", "fp", "bf16", "i8mm")
_INSTRUCTION_SETS = (*_X86, *_X86_ELSE, *_ARM)


def digest_of(value: Any) -> str:
    """SHA-256 of a value as canonical JSON.

    >>> digest_of({"b": 1, "a": [True, None]}) == digest_of({"a": [True, None], "b": 1})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def platform_entries() -> dict[str, Any]:
    """What an artifact's libraries and graphs depend on of this machine and this Python, by name."""
    return {
        "format": FORMAT,
        "torch": torch.__version__,
        "python": f"{sys.implementation.name} {sys.version_info.major}.{sys.version_info.minor}",
        "platform": f"{platform.system().lower()}-{platform.machine()}",
        "isa": {"capability": torch.backends.cpu.get_cpu_capability(), "flags": _cpu_flags()},
    }


def making_entries() -> dict[str, Any]:
    """`platform_entries`, and entries for readers only, as triton's version: libraries for a CPU do not use it."""
    from torchspan.environment.facts import installed_version

    return {**platform_entries(), "triton": installed_version("triton")}


def _cpu_flags() -> list[str]:
    """The instruction sets of this machine's processor that compilers use."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return []
    with path.open() as lines:
        line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return sorted(flag for flag in line.partition(":")[2].split() if flag.startswith(_INSTRUCTION_SETS))


def model_entries(target: Any) -> dict[str, Any]:
    """What an artifact expects of a model (or function): its code, and its parameters and buffers; never their values."""
    if not isinstance(target, torch.nn.Module):
        return {"model": name_of(target), "code": digest_function(target), "state": {}, "tied": []}
    classes = {type(module) for module in target.modules()}
    codes = sorted([name_of(cls), digest_class(cls)] for cls in classes)
    named = [*target.named_parameters(remove_duplicate=False), *target.named_buffers(remove_duplicate=False)]
    shared: dict[int, list[str]] = {}
    for name, tensor in named:
        shared.setdefault(id(tensor), []).append(name)
    return {
        "model": name_of(type(target)),
        "code": digest_of(codes),
        "state": {
            name: [list(tensor.shape), str(tensor.dtype).removeprefix("torch."), str(tensor.device)] for name, tensor in named
        },
        "tied": sorted(sorted(names) for names in shared.values() if len(names) > 1),
    }


def write_manifest(entries: Mapping[str, Any], payloads: Mapping[str, bytes], programs: list[dict[str, Any]]) -> bytes:
    """A manifest: every entry with its digest, every payload with its size and digest, which entries the artifact has."""
    body = {
        "entries": {name: {"value": value, "digest": digest_of(value)} for name, value in entries.items()},
        "payloads": [
            {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in payloads.items()
        ],
        "programs": programs,
    }
    return json.dumps({**body, "digest": digest_of(body)}, indent=1).encode()


def read_manifest(data: bytes) -> dict[str, Any]:
    """The manifest, whose digests hold.

    Raises:
        IntegrityError: it is not what `write_manifest` wrote.
    """
    try:
        manifest = json.loads(data)
        body = {name: manifest[name] for name in ("entries", "payloads", "programs")}
        stated = manifest["digest"]
        entries = {name: (entry["value"], entry["digest"]) for name, entry in body["entries"].items()}
        for payload in body["payloads"]:
            payload["name"], payload["size"], payload["sha256"]
        if "isa" in entries:
            entries["isa"][0]["capability"], set(entries["isa"][0]["flags"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as cause:
        raise IntegrityError(
            f"the artifact's manifest cannot be read ({type(cause).__name__}: {cause}); make the artifact again"
        ) from cause
    changed = sorted(name for name, (value, digest) in entries.items() if digest_of(value) != digest)
    if changed or digest_of(body) != stated:
        raise IntegrityError(
            f"the artifact's manifest is not as it was written (entries {changed or 'none'} differ); build it again"
        )
    return dict(manifest)


def values_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The entries' values by name."""
    return {name: entry["value"] for name, entry in manifest["entries"].items()}


def check_manifest(manifest: Mapping[str, Any], target: Any) -> None:
    """Raise ManifestMismatchError, with the entries that differ and how to rebuild, unless the artifact fits here."""
    differ = mismatches(manifest, {**platform_entries(), **model_entries(target)})
    if differ:
        differences = "; ".join(f"entry {name!r}: {how}" for name, how in differ.items())
        raise ManifestMismatchError(
            f"the artifact does not fit here: {differences}. Rebuild it: {values_of(manifest).get('rebuild')}"
        )


def mismatches(manifest: Mapping[str, Any], actual: Mapping[str, Any]) -> dict[str, str]:
    """The entries that differ from the `actual` ones of this machine: what the artifact was made for, and what this is."""
    expected = values_of(manifest)
    differ = [name for name in actual if _differs(name, expected.get(name), actual[name])]
    return {name: f"made for {_show(name, expected.get(name), actual[name])}" for name in differ}


def _differs(name: str, expected: Any, actual: Any) -> bool:
    if name == "isa" and isinstance(expected, dict):
        return expected["capability"] != actual["capability"] or not set(expected["flags"]) <= set(actual["flags"])
    if name == "format":
        return expected not in (FORMAT, FORMAT_DYNAMIC, FORMAT_OBJECTS)
    return bool(expected != actual)


def _show(name: str, expected: Any, actual: Any) -> str:
    if name == "isa" and isinstance(expected, dict):
        lacking = sorted(set(expected["flags"]) - set(actual["flags"]))
        return f"{expected['capability']}, this is {actual['capability']}" + (
            f" without {', '.join(lacking)}" if lacking else ""
        )
    if name == "state" and isinstance(expected, dict):
        names = sorted(key for key in {*expected, *actual} if expected.get(key) != actual.get(key))
        parts = [f"{key} {expected.get(key, 'absent')}, this has {actual.get(key, 'none')}" for key in names[:3]]
        return "; ".join(parts) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")
    if name == "code":
        return "other code of the model's classes than is here"
    return f"{expected}, this is {actual}"
