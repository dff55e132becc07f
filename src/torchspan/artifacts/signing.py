"""Signatures of artifacts: an HMAC with a secret that both sides know, or Ed25519, whose public key is no secret."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchspan.core.errors import InputError, UntrustedError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

    Key = bytes | Ed25519PrivateKey | Ed25519PublicKey

_SHORTEST = 16  # bytes of a secret
_HMAC, _ED25519 = "hmac-sha256", "ed25519"


def read_key(path: str | os.PathLike[str]) -> Key:
    """The key in a file: an Ed25519 key in PEM form, private or public, or else a secret: all bytes of the file.

    Raises:
        InputError: there is no such file, the secret is shorter than 16 bytes, or the PEM holds another kind of key.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as cause:
        raise InputError(f"no key can be read from {str(path)!r}: {cause.strerror}") from cause
    if not content.startswith(b"-----BEGIN"):
        return _secret(content)
    from cryptography.hazmat.primitives import serialization

    is_private = b"PRIVATE KEY" in content.splitlines()[0]
    try:
        key = serialization.load_pem_private_key(content, None) if is_private else serialization.load_pem_public_key(content)
    except (ValueError, TypeError) as cause:
        raise InputError(f"{str(path)!r} is not a readable key in PEM form ({cause})") from cause
    _check(key)
    return key  # type: ignore[return-value]


def sign(manifest: bytes, key: Key) -> bytes:
    """A signature of a manifest, which holds the digests of all payloads, as JSON.

    >>> check(b"manifest", sign(b"manifest", b"sixteen bytes or more"), [b"sixteen bytes or more"])
    """
    kind = _check(key)
    if kind == _HMAC:
        assert isinstance(key, bytes)
        value = hmac.digest(key, manifest, "sha256")
    elif hasattr(key, "sign"):
        value = key.sign(manifest)
    else:
        raise InputError("a public key cannot sign; give the private key")
    return json.dumps({"kind": kind, "key": key_name(key), "signature": value.hex()}).encode()


def check(manifest: bytes, signature: bytes | None, trusted: Sequence[Key]) -> None:
    """Raise UntrustedError unless one of the `trusted` keys signed the manifest."""
    names = {f"{_check(key)} {key_name(key)}": key for key in trusted}
    trusted_names = f"trusted are: {', '.join(names) or 'none'}"
    if signature is None:
        raise UntrustedError(f"the artifact is not signed, and {trusted_names}; sign it with Artifact.save(path, key=...)")
    name, value = _read(signature)
    if name not in names:
        raise UntrustedError(f"the artifact is signed by {name[:80]}, and {trusted_names}")
    if not _holds(names[name], manifest, value):
        raise UntrustedError(f"the artifact's signature by {name} does not hold: it was changed after it was signed")


def signer(signature: bytes | None) -> str | None:
    """The name of the signer that a signature claims; not verified, which takes a key."""
    if signature is None:
        return None
    try:
        return _read(signature)[0][:80]
    except UntrustedError:
        return "a signature that cannot be read"


def _read(signature: bytes) -> tuple[str, bytes]:
    """Who signed, and the value."""
    try:
        record = json.loads(signature)
        return f"{record['kind']} {record['key']}", bytes.fromhex(record["signature"])
    except (ValueError, KeyError, TypeError, RecursionError) as cause:
        raise UntrustedError(
            f"the artifact's signature cannot be read ({type(cause).__name__}); sign the artifact again"
        ) from cause


def key_name(key: Key) -> str:
    """A short name of a key that tells nothing of a secret: the same for a private key and its public one.

    >>> key_name(b"sixteen bytes or more")
    '9e2bdb5a7578'
    """
    public = b"torchspan-key" + key if isinstance(key, bytes) else _public(key).public_bytes_raw()
    return hashlib.sha256(public).hexdigest()[:12]


def _holds(key: Key, manifest: bytes, value: bytes) -> bool:
    if isinstance(key, bytes):
        return hmac.compare_digest(hmac.digest(key, manifest, "sha256"), value)
    from cryptography.exceptions import InvalidSignature

    try:
        _public(key).verify(value, manifest)
    except InvalidSignature:
        return False
    return True


def _public(key: Any) -> Ed25519PublicKey:
    public: Ed25519PublicKey = key.public_key() if hasattr(key, "public_key") else key
    return public


def _check(key: Any) -> str:
    if isinstance(key, bytes):
        _secret(key)
        return _HMAC
    if type(key).__name__.endswith(("Ed25519PrivateKey", "Ed25519PublicKey")):
        return _ED25519
    raise InputError(f"a key is bytes, for an HMAC, or an Ed25519 key of the package cryptography, not {type(key).__name__}")


def _secret(content: bytes) -> bytes:
    if len(content) < _SHORTEST:
        raise InputError(f"a secret of {len(content)} bytes is too short to be safe; expected at least {_SHORTEST}")
    return content
