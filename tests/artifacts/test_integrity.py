"""A file that is not what was written, or was made for something else, is refused before anything in it is used."""

from __future__ import annotations

import json
import random
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from torchspan.artifacts import load
from torchspan.artifacts._manifest import digest_of
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
    ("name", "value", "said"),
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
    name: str, value: object, said: str, models: types.ModuleType, make: Callable[..., Path], tmp_path: Path
) -> None:
    other = rewrite(make("mlp"), tmp_path / "other.tspan", with_entry(name, value))
    with pytest.raises(ManifestMismatchError, match=said + ".*Rebuild it: torchspan precompile .* --inputs 'float32") as error:
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
    ("change", "said"),
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
    change: Callable, said: str, models: types.ModuleType, make: Callable[..., Path], tmp_path: Path
) -> None:
    changed = rewrite(make("mlp"), tmp_path / "changed.tspan", change)
    with pytest.raises(IntegrityError, match=said):
        load(changed, models.mlp())


@pytest.mark.once
def test_no_cut_and_no_flipped_bit_loads_or_crashes(
    models: types.ModuleType, make: Callable[..., Path], tmp_path: Path
) -> None:
    whole, model = make("mlp").read_bytes(), models.mlp()
    args, kwargs = models.inputs("mlp")
    expected = models.loss_of(model(*args, **kwargs)).item()
    generator = random.Random(0)
    path, refused = tmp_path / "mutated.tspan", 0
    for number in range(300):
        data = bytearray(whole)
        if number % 3 == 0:
            del data[generator.randrange(len(data)) :]
        else:
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(bytes(data))
        try:
            found = models.loss_of(load(path, model)(*args, **kwargs)).item()
        except ArtifactError:
            refused += 1
        else:  # a bit that the zip format does not use, such as a file's date
            assert found == expected, f"mutation {number} was loaded and computes something else"
    assert refused > 200


def test_files_that_are_no_artifacts_are_one_clear_error(models: types.ModuleType, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no artifact .*missing\.tspan"):
        load(tmp_path / "missing.tspan", models.mlp())
    (tmp_path / "text.tspan").write_text("not a zip")
    with pytest.raises(IntegrityError, match="is no artifact, or not all of one"):
        load(tmp_path / "text.tspan", models.mlp())
    with pytest.raises(InputError, match="is a folder"):
        load(tmp_path, models.mlp())


def test_a_write_that_fails_leaves_what_was_there(
    models: types.ModuleType, make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchspan.artifacts import _store

    path = tmp_path / "model.tspan"
    path.write_bytes(make("mlp").read_bytes())

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_store.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        _store.write_artifact(path, b"{}", {})
    assert path.read_bytes() == make("mlp").read_bytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.tspan"]
    with pytest.raises(InputError, match="no folder"):
        _store.write_artifact(tmp_path / "absent" / "model.tspan", b"{}", {})


def test_an_operator_that_reads_files_cannot_be_named() -> None:
    from torchspan.artifacts._program import find_operator
    from torchspan.core.errors import UnsupportedError

    for name in ("aten.from_file.default", "os.system.x", "aten.add", "profiler._record_function_enter.default"):
        with pytest.raises(UnsupportedError, match="may not name the operator"):
            find_operator(name)
    assert find_operator("aten.add.Tensor") is torch.ops.aten.add.Tensor
