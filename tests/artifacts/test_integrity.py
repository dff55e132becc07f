"""A file that is not what was written, or was made for something else, is refused before anything in it is used."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from torchspan.artifacts import load
from torchspan.artifacts.manifest import digest_of
from torchspan.artifacts.signing import sign
from torchspan.core.errors import ArtifactError, InputError, IntegrityError, ManifestMismatchError


def rewrite(path: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy of an artifact with other members; sizes and checksums of the zip are right again."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return target


def with_entry(name: str, value: object) -> Callable[[dict[str, bytes]], None]:
    """Another value for an entry of the manifest, every digest right again: what another machine would have written."""

    def change(members: dict[str, bytes]) -> None:
        manifest = json.loads(members["manifest.json"])
        manifest["entries"][name] = {"value": value, "digest": digest_of(value)}
        manifest["digest"] = digest_of({key: manifest[key] for key in ("entries", "payloads", "programs")})
        members["manifest.json"] = json.dumps(manifest).encode()

    return change


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("torch", "1.0.0", r"entry 'torch': made for 1.0.0, this is " + torch.__version__.replace("+", r"\+")),
        ("python", "cpython 2.7", "entry 'python': made for cpython 2.7"),
        ("platform", "plan9-mips", "entry 'platform': made for plan9-mips"),
        ("format", 99, "entry 'format': made for 99, this is 1"),
        ("isa", {"capability": "AVX9000", "flags": ["avx9000"]}, "entry 'isa': made for AVX9000, this is .* without avx9000"),
        ("code", "0" * 64, "entry 'code': made for other code of the model's classes"),
    ],
)
def test_what_was_made_for_something_else_is_refused_by_the_entry(
    name: str, value: object, message: str, models: types.ModuleType, make: Callable[..., Path], tmp_path: Path
) -> None:
    other = rewrite(make("mlp"), tmp_path / "other.tspan", with_entry(name, value))
    with pytest.raises(
        ManifestMismatchError, match=message + ".*Rebuild it: torchspan precompile .* --inputs 'float32"
    ) as error:
        load(other, models.mlp())
    assert str(error.value).count("entry '") == 1


def test_a_model_of_another_signature_is_refused_by_the_names_that_differ(
    models: types.ModuleType, make: Callable[..., Path]
) -> None:
    model = models.mlp()
    model.fc2 = torch.nn.Linear(20, 6)
    with pytest.raises(
        ManifestMismatchError, match=r"entry 'state': made for fc2.bias \[\[5\], 'float32', 'cpu'\], this has \[\[6\]"
    ):
        load(make("mlp"), model)
    untied = models.tied()
    untied.head.weight = torch.nn.Parameter(untied.head.weight.detach().clone())
    with pytest.raises(
        ManifestMismatchError, match=r"entry 'tied': made for \[\['embed.weight', 'head.weight'\]\], this is \[\]"
    ):
        load(make("tied"), untied)
    with pytest.raises(
        ManifestMismatchError, match="entry 'model': made for artifact_models:MLP, this is artifact_models:Tied"
    ):
        load(make("mlp"), models.tied())


def flip_payload(members: dict[str, bytes]) -> None:
    data = bytearray(members["entry0/plan.json"])
    data[10] ^= 1
    members["entry0/plan.json"] = bytes(data)


def flip_manifest(members: dict[str, bytes]) -> None:
    members["manifest.json"] = members["manifest.json"].replace(b'"eager"', b'"eagle"', 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_payload, "payload 'entry0/plan.json' is not as it was written"),
        (flip_manifest, "manifest is not as it was written"),
        (lambda members: members.update({"manifest.json": b"[]"}), "manifest cannot be read"),
        (lambda members: members.update({"manifest.json": b"{" * 100_000}), "manifest cannot be read"),
        (lambda members: members.pop("manifest.json"), "expected manifest.json first"),
        (lambda members: members.pop("entry0/guards.json"), "does not hold the payloads that its manifest lists"),
        (lambda members: members.update({"../../evil": b"x"}), "does not hold the payloads that its manifest lists"),
    ],
    ids=["payload", "manifest", "no-object", "deep", "no-manifest", "missing", "extra"],
)
def test_a_changed_file_is_refused(
    change: Callable, message: str, models: types.ModuleType, make: Callable[..., Path], tmp_path: Path
) -> None:
    changed = rewrite(make("mlp"), tmp_path / "changed.tspan", change)
    with pytest.raises(IntegrityError, match=message):
        load(changed, models.mlp())


def cut(members: dict[str, bytes], some: random.Random) -> dict[str, bytes] | bytes:
    whole = packed(members)
    return whole[: some.randrange(len(whole))]


def flip_a_bit(members: dict[str, bytes], some: random.Random) -> dict[str, bytes] | bytes:
    whole = bytearray(packed(members))
    whole[some.randrange(len(whole))] ^= 1 << some.randrange(8)
    return bytes(whole)


def overwrite_a_stretch(members: dict[str, bytes], some: random.Random) -> dict[str, bytes] | bytes:
    whole = bytearray(packed(members))
    start = some.randrange(len(whole))
    whole[start : start + some.randrange(1, 64)] = some.randbytes(some.randrange(64))
    return bytes(whole)


def reorder(members: dict[str, bytes], some: random.Random) -> dict[str, bytes] | bytes:
    names = list(members)
    while names == list(members):
        some.shuffle(names)
    return {name: members[name] for name in names}


def rename_out_of_the_folder(members: dict[str, bytes], some: random.Random) -> dict[str, bytes] | bytes:
    renamed = some.choice(list(members))
    away = some.choice(["../", "/etc/", "..\\", "C:\\"])
    return {f"{away}{name}" if name == renamed else name: data for name, data in members.items()}


def grow(members: dict[str, bytes], some: random.Random) -> dict[str, bytes] | bytes:
    name = some.choice(list(members))
    return {**members, name: members[name] + some.randbytes(some.randrange(1, 4096))}


def put_a_pickle_in(members: dict[str, bytes], some: random.Random) -> dict[str, bytes] | bytes:
    return {**members, some.choice(list(members)): pickle.dumps(Hostile())}


def forge_a_value(members: dict[str, bytes], some: random.Random) -> dict[str, bytes] | bytes:
    """Another value somewhere in the plan or the guards, every digest right again: what a signature is against."""
    name = some.choice([name for name in members if name.startswith("entry0/") and name.endswith(".json")])
    forged = {**members, name: json.dumps(changed(json.loads(members[name]), some)).encode()}
    manifest = json.loads(members["manifest.json"])
    for payload in manifest["payloads"]:
        data = forged[payload["name"]]
        payload |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["digest"] = digest_of({key: manifest[key] for key in ("entries", "payloads", "programs")})
    return {**forged, "manifest.json": json.dumps(manifest).encode()}


def changed(value: Any, some: random.Random) -> Any:
    """`value` with something else at one place in it."""
    if isinstance(value, dict) and value:
        key = some.choice(list(value))
        return {**value, key: changed(value[key], some)}
    if isinstance(value, list) and value:
        index = some.randrange(len(value))
        return [*value[:index], changed(value[index], some), *value[index + 1 :]]
    return some.choice([None, -1, 10**12, "aten.from_file.default", [], {}, True, 0.5, [[]], {"step": 10**6}])


class Hostile:
    def __reduce__(self) -> Any:
        return Path.write_text, (Path(os.environ["TORCHSPAN_TEST_MARK"]), "it ran")


def packed(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


@pytest.mark.once
@pytest.mark.parametrize(
    ("mutate", "count"),
    [
        (cut, 400),
        (flip_a_bit, 600),
        (overwrite_a_stretch, 400),
        (reorder, 100),
        (rename_out_of_the_folder, 100),
        (grow, 100),
        (put_a_pickle_in, 100),
        (forge_a_value, 400),
    ],
)
def test_of_2200_mutations_none_loads_signed_and_none_does_harm(
    mutate: Callable[[dict[str, bytes], random.Random], dict[str, bytes] | bytes],
    count: int,
    models: types.ModuleType,
    make: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHSPAN_TEST_MARK", str(tmp_path / "ran"))
    key, model = b"a secret of enough bytes", models.mlp()
    with zipfile.ZipFile(make("mlp")) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["signature.json"] = sign(members["manifest.json"], key)
    args, kwargs = models.inputs("mlp")
    expected = models.loss_of(model(*args, **kwargs)).item()
    some, path, num_refused = random.Random(0), tmp_path / "mutated.tspan", 0
    for number in range(count):
        mutated = mutate(members, some)
        path.write_bytes(mutated if isinstance(mutated, bytes) else packed(mutated))
        try:
            loaded = load(path, model, trusted_keys=[key])
        except ArtifactError:
            num_refused += 1
        else:  # a bit that the zip format does not use, such as a file's date
            assert models.loss_of(loaded(*args, **kwargs)).item() == expected, f"mutation {number} computes something else"
        with contextlib.suppress(ArtifactError):  # a forged value may be harmless; nothing but a clear error may be raised
            load(path, model)
    assert num_refused >= count * (0.7 if mutate in (flip_a_bit, overwrite_a_stretch) else 1)
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_artifacts_are_one_clear_error(models: types.ModuleType, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no artifact .*missing\.tspan"):
        load(tmp_path / "missing.tspan", models.mlp())
    (tmp_path / "text.tspan").write_text("not a zip")
    with pytest.raises(IntegrityError, match="is not an artifact, or only a part of one"):
        load(tmp_path / "text.tspan", models.mlp())
    with pytest.raises(InputError, match="is a folder"):
        load(tmp_path, models.mlp())


def test_a_write_that_fails_leaves_what_was_there(
    models: types.ModuleType, make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchspan.artifacts import container

    path = tmp_path / "model.tspan"
    path.write_bytes(make("mlp").read_bytes())

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(container.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        container.write_artifact(path, b"{}", {})
    assert path.read_bytes() == make("mlp").read_bytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.tspan"]
    with pytest.raises(InputError, match="no folder"):
        container.write_artifact(tmp_path / "absent" / "model.tspan", b"{}", {})


def test_an_operator_that_reads_files_cannot_be_named() -> None:
    from torchspan.artifacts.instructions import find_operator
    from torchspan.core.errors import UnsupportedError

    for name in ("aten.from_file.default", "os.system.x", "aten.add", "profiler._record_function_enter.default"):
        with pytest.raises(UnsupportedError, match="may not name the operator"):
            find_operator(name)
    assert find_operator("aten.add.Tensor") is torch.ops.aten.add.Tensor
