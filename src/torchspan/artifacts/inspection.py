"""What can be told of artifacts without a model: what is inside, whether they are whole and fit here, how two differ."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchspan.artifacts.container import Store
from torchspan.artifacts.manifest import mismatches, platform_entries, values_of
from torchspan.artifacts.signing import check, signer

if TYPE_CHECKING:
    from torchspan.artifacts.signing import Key


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What an artifact's manifest says, without opening anything else in it: entries by name, payloads, programs, signer.

    Raises:
        InputError: there is no such file.
        ArtifactError: it is no artifact.
    """
    with Store(Path(path)) as store:
        manifest = store.manifest
        signature = store.signature
    return {
        "path": str(path),
        "entries": values_of(manifest),
        "digests": {name: entry["digest"] for name, entry in manifest["entries"].items()},
        "payloads": manifest["payloads"],
        "programs": manifest["programs"],
        "signed_by": signer(signature),
    }


def verify(path: str | os.PathLike[str], trusted_keys: Sequence[Key] | None = None) -> dict[str, Any]:
    """Read every byte of an artifact and hold it to its digests, and to a signature if `trusted_keys` are given.

    Returns:
        ``signed_by`` (None: nobody), the number of ``payloads`` and ``bytes``, and ``differs``: the entries that do not fit
        this machine and torch, each with what was expected and found; empty where it would load, given its model.

    Raises:
        InputError: there is no such file.
        IntegrityError: it is not what was written; UntrustedError: not signed by one of the keys.
    """
    with Store(Path(path)) as store:
        if trusted_keys is not None:
            check(store.manifest_bytes, store.signature, trusted_keys)
        payloads = store.payloads()
        manifest, signature = store.manifest, store.signature
    return {
        "path": str(path),
        "signed_by": signer(signature),
        "payloads": len(payloads),
        "bytes": sum(map(len, payloads.values())),
        "differs": mismatches(manifest, platform_entries()),
    }


def diff(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> dict[str, Any]:
    """How two artifacts differ: ``entries`` (name → both values) and ``payloads`` (name → both digests; None: not there).

    Raises:
        InputError, IntegrityError: as for `describe`.
    """
    left, right = describe(first), describe(second)
    return {
        "entries": _differing(left["entries"], right["entries"]),
        "payloads": _differing(_digests(left), _digests(right)),
    }


def _digests(described: Mapping[str, Any]) -> dict[str, str]:
    return {payload["name"]: payload["sha256"] for payload in described["payloads"]}


def _differing(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, list[Any]]:
    names = dict.fromkeys([*left, *right])
    return {name: [left.get(name), right.get(name)] for name in names if left.get(name) != right.get(name)}
