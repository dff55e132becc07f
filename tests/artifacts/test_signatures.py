"""Signed artifacts: only what a trusted key signed is loaded, and nothing that was changed afterwards."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from torchspan.artifacts import Artifact, describe, load, precompile, read_key, verify
from torchspan.core.errors import InputError, UntrustedError

SECRET, OTHER = b"a secret of enough bytes", b"another secret, as long"


@pytest.fixture(scope="module")
def artifact(models: types.ModuleType) -> Artifact:
    args, kwargs = models.inputs("mlp")
    return precompile(models.mlp(), args, kwargs, compiler="eager")


@pytest.mark.parametrize("kind", ["hmac", "ed25519"])
def test_what_a_trusted_key_signed_loads_and_nothing_else(
    kind: str, artifact: Artifact, models: types.ModuleType, tmp_path: Path
) -> None:
    private, stranger = (SECRET, OTHER) if kind == "hmac" else (Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate())
    public = private if isinstance(private, bytes) else private.public_key()
    path, model = artifact.save(tmp_path / "model.tspan", key=private), models.mlp()
    args, kwargs = models.inputs("mlp")
    loaded = load(path, model, trusted_keys=[stranger, public])
    assert torch.equal(models.loss_of(loaded(*args, **kwargs)), models.loss_of(model(*args, **kwargs)))
    assert str(describe(path)["signed_by"]).startswith(kind)
    with pytest.raises(UntrustedError, match=r"the artifact is signed by .*, and trusted are: "):
        load(path, model, trusted_keys=[stranger])
    with pytest.raises(UntrustedError, match="trusted are: none"):
        verify(path, [])
    artifact.save(path)
    with pytest.raises(UntrustedError, match="the artifact is not signed"):
        load(path, model, trusted_keys=[public])


def test_a_signature_holds_for_one_content_only(artifact: Artifact, models: types.ModuleType, tmp_path: Path) -> None:
    import zipfile

    signed, other = artifact.save(tmp_path / "signed.tspan", key=SECRET), tmp_path / "other.tspan"
    more = precompile(models.mlp(), *models.inputs("mlp"), compiler="eager")
    more.entries["passes"] = ["forged"]
    more.save(other)
    with zipfile.ZipFile(signed) as archive, zipfile.ZipFile(other, "a") as target:
        target.writestr("signature.json", archive.read("signature.json"))
    with pytest.raises(UntrustedError, match="does not hold: it was changed after it was signed"):
        load(other, models.mlp(), trusted_keys=[SECRET])


def test_keys_are_read_from_files(tmp_path: Path, artifact: Artifact) -> None:
    key = Ed25519PrivateKey.generate()
    (tmp_path / "private").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "public").write_bytes(public)
    path = artifact.save(tmp_path / "model.tspan", key=read_key(tmp_path / "private"))
    assert verify(path, [read_key(tmp_path / "public")])["differs"] == {}
    (tmp_path / "secret").write_bytes(SECRET)
    assert read_key(tmp_path / "secret") == SECRET


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"short", "a secret of 5 bytes is too short to be safe; expected at least 16"),
        (b"-----BEGIN PUBLIC KEY-----\nnonsense\n", "is not a readable key in PEM form"),
        (
            generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            "an Ed25519 key of the package cryptography, not",
        ),
    ],
    ids=["short", "nonsense", "other kind"],
)
def test_what_is_no_key_is_one_clear_error(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_key(tmp_path / "key")
    with pytest.raises(InputError, match="no key can be read from"):
        read_key(tmp_path / "absent")


def test_a_public_key_signs_nothing(artifact: Artifact, tmp_path: Path, make: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="a public key cannot sign"):
        artifact.save(tmp_path / "model.tspan", key=Ed25519PrivateKey.generate().public_key())
    assert not (tmp_path / "model.tspan").exists()
