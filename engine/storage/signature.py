"""Ed25519 signatures of bundles: a hash says that a bundle is whole, a signature says who made it.

    signature = Ed25519("skipstep bundle 1" NUL sha256(data))        64 bytes

The words in front keep a signature from meaning anything elsewhere. What is signed is a manifest, which holds the size
and hash of every other file. Ed25519: RFC 8032. Keys are PEM files, PKCS 8 and SubjectPublicKeyInfo, as openssl writes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from skipstep.errors import InputError, SignatureError, StorageError, check_path, optional_package
from skipstep.storage.atomic import atomic_write
from skipstep.storage.verified import read_regular

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE_SIZE = 64
_DOMAIN = b"skipstep bundle 1\0"
_MAX_KEY_BYTES = 1 << 14
Path = str | os.PathLike[str]


def generate_key(private_path: Path, public_path: Path) -> None:
    """Write a new private key, readable by its owner alone, and the public key that verifies what it signs.

    Raises InputError where either name is taken, StorageError, and MissingDependencyError, and then writes neither.
    """
    private_path, public_path = check_path("private_path", private_path), check_path("public_path", public_path)
    serialization = _serialization()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    pem = serialization.Encoding.PEM
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write_new(public_path, public, mode=0o644)
    try:
        _write_new(private_path, private, mode=0o600)
    except BaseException:
        os.unlink(public_path)
        raise


def sign(data: bytes, private_key_path: Path) -> bytes:
    """The 64-byte signature of `data`. Raises InputError for a file without such a key, and MissingDependencyError."""
    message = _message(data)
    return _private_key(private_key_path).sign(message)


def verify(data: bytes, signature: bytes, public_key_path: Path) -> None:
    """Return if `signature` is that of `data` by this key, and raise SignatureError if it is not, or missing.

    Raises InputError for a file without such a key, and MissingDependencyError.
    """
    _checked_bytes("signature", signature)
    message = _message(data)
    key = _public_key(public_key_path)
    from cryptography.exceptions import InvalidSignature

    if len(signature) != SIGNATURE_SIZE:
        raise SignatureError(
            got=f"{len(signature)} bytes as a signature" if signature else "no signature",
            expected=f"{SIGNATURE_SIZE} bytes, an Ed25519 signature",
            remedy="sign the bundle with skipstep sign, or take it from a source that does",
        )
    try:
        key.verify(signature, message)
    except InvalidSignature as error:
        raise SignatureError(
            got="a signature by another key, or of other bytes",
            expected=f"one of these bytes by the key {os.fspath(public_key_path)}",
            remedy="do not use what was signed; take it again from its source, and check whose key this is",
        ) from error


def _message(data: bytes) -> bytes:
    return _DOMAIN + hashlib.sha256(_checked_bytes("data", data)).digest()


def _checked_bytes(name: str, value: object) -> bytes:
    if not isinstance(value, bytes):
        raise InputError(
            got=f"{name} of type {type(value).__name__}", expected="bytes", remedy=f"read {name} from its file"
        )
    return value


def _private_key(path: Path) -> Ed25519PrivateKey:
    load = _serialization().load_pem_private_key
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key: Ed25519PrivateKey = _parsed(path, lambda data: load(data, password=None), Ed25519PrivateKey, "private")
    return key


def _public_key(path: Path) -> Ed25519PublicKey:
    load = _serialization().load_pem_public_key
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    key: Ed25519PublicKey = _parsed(path, load, Ed25519PublicKey, "public")
    return key


def _parsed(path: Path, parse: Callable[[bytes], Any], cls: type, kind: str) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm

    path = check_path(f"{kind} key", path)
    try:
        data = read_regular(path, _MAX_KEY_BYTES, follow=True)
    except OSError as error:
        raise _not_a_key(path, error.strerror or str(error), kind) from error
    try:
        key = parse(data)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        # The parser's message can quote the file, and a wrong file may be a secret.
        encrypted = isinstance(error, TypeError)
        raise _not_a_key(path, "an encrypted key" if encrypted else "no such key", kind) from None
    if not isinstance(key, cls):
        raise _not_a_key(path, f"a key of another kind, {type(key).__name__}", kind)
    return key


def _not_a_key(path: Path, got: str, kind: str) -> InputError:
    return InputError(
        got=f"{os.fspath(path)!r}: {got}",
        expected=f"a readable PEM file with an unencrypted Ed25519 {kind} key",
        remedy="make a pair with skipstep keygen, and pass the private one to sign and the public one to verify",
    )


def _serialization() -> Any:
    """What reads and writes keys. Imported where keys are used: a bundle without a signature does not pay for it."""
    name = "cryptography.hazmat.primitives.serialization"
    return optional_package(name, use="signs and verifies", remedy="pip install 'skipstep[sign]'")


def _write_new(path: Path, data: bytes, *, mode: int) -> None:
    """Write a file whose name must be free; an existing one, even a link to nowhere, is left as it is."""
    try:
        atomic_write(path, data, mode=mode, replace=False)
    except StorageError as error:
        if not isinstance(error.__cause__, FileExistsError):
            raise
        raise InputError(
            got=f"{os.fspath(path)!r}, which is there already",
            expected="a free name: a private key that is overwritten is lost",
            remedy="choose another name, or move the file away",
        ) from error
