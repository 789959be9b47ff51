"""Signatures: what verifies, and that nothing else does."""

from __future__ import annotations

import os
import stat

import pytest
from faults import DROP_PRIVILEGES, file_size_limit, run_python, shared_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from skipstep.errors import InputError, SignatureError, StorageError
from skipstep.storage.signature import SIGNATURE_SIZE, generate_key, sign, verify

pytest.importorskip("cryptography", reason="pip install 'skipstep[sign]'")

DATA = b'{"schema": 1}'


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    generate_key(folder / "key", folder / "key.pub")
    return folder / "key", folder / "key.pub"


def test_what_was_signed_verifies(keys):
    private, public = keys
    for data in (DATA, b"", bytes(1 << 20)):
        signature = sign(data, private)
        assert len(signature) == SIGNATURE_SIZE
        assert sign(data, str(private)) == signature
        verify(data, signature, public)


@settings(deadline=None)
@given(bit=st.integers(0, 8 * SIGNATURE_SIZE - 1))
def test_no_bit_of_a_signature_may_change(keys, bit):
    private, public = keys
    signature = bytearray(sign(DATA, private))
    signature[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SignatureError, match="another key, or of other bytes"):
        verify(DATA, bytes(signature), public)


def test_a_signature_has_one_form(keys):
    """S and S + L mean the same to the equation: only the smaller may verify, or a signature would not be unique."""
    private, public = keys
    signature = sign(b"data", private)
    order = 2**252 + 27742317777372353535851937790883648493
    shifted = int.from_bytes(signature[32:], "little") + order
    with pytest.raises(SignatureError):
        verify(b"data", signature[:32] + shifted.to_bytes(32, "little"), public)


def test_other_bytes_and_other_keys_do_not_verify(keys, tmp_path):
    private, public = keys
    signature = sign(DATA, private)
    for data in (DATA + b" ", DATA[:-1], b""):
        with pytest.raises(SignatureError):
            verify(data, signature, public)
    generate_key(tmp_path / "other", tmp_path / "other.pub")
    with pytest.raises(SignatureError, match="another key"):
        verify(DATA, signature, tmp_path / "other.pub")


def test_a_signature_of_the_bare_bytes_means_nothing(keys):
    """Whoever gets the key's owner to sign some bytes elsewhere has no signature of a bundle."""
    from cryptography.hazmat.primitives import serialization

    private, public = keys
    key = serialization.load_pem_private_key(private.read_bytes(), password=None)
    with pytest.raises(SignatureError):
        verify(DATA, key.sign(DATA), public)


@pytest.mark.parametrize("signature", [b"", b"x" * 63, b"x" * 65, b"-----BEGIN SIGNATURE-----"])
def test_what_is_no_signature_is_refused(keys, signature):
    with pytest.raises(SignatureError, match="no signature" if not signature else f"{len(signature)} bytes"):
        verify(DATA, signature, keys[1])


def test_the_private_key_is_its_owners_alone(tmp_path):
    umask = os.umask(0)
    try:
        generate_key(tmp_path / "key", tmp_path / "key.pub")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "key.pub").stat().st_mode) == 0o644


@pytest.mark.parametrize("taken", ["key", "key.pub"])
@pytest.mark.parametrize("link", [False, True])
def test_no_key_is_overwritten(tmp_path, taken, link):
    if link:
        (tmp_path / taken).symlink_to(tmp_path / "nowhere")
    else:
        (tmp_path / taken).write_text("mine")
    with pytest.raises(InputError, match="there already"):
        generate_key(tmp_path / "key", tmp_path / "key.pub")
    assert os.listdir(tmp_path) == [taken]
    assert link or (tmp_path / taken).read_text() == "mine"


def test_one_name_for_both_is_refused(tmp_path):
    with pytest.raises(InputError, match="there already"):
        generate_key(tmp_path / "key", tmp_path / "key")
    assert os.listdir(tmp_path) == []


def test_a_key_is_whole_or_absent(tmp_path):
    with file_size_limit(50), pytest.raises(StorageError, match="File too large"):
        generate_key(tmp_path / "key", tmp_path / "key.pub")
    # The public key fits into 115 bytes and the private one, of 119, does not.
    with file_size_limit(115), pytest.raises(StorageError, match="File too large"):
        generate_key(tmp_path / "key", tmp_path / "key.pub")
    assert os.listdir(tmp_path) == []
    with pytest.raises(StorageError, match="No such file"):
        generate_key(tmp_path / "absent/key", tmp_path / "absent/key.pub")


def test_what_is_no_key_is_refused(keys, tmp_path):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    private, public = keys
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    other = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "ec").write_bytes(other.private_bytes(pem, pkcs8, serialization.NoEncryption()))
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "ec.pub").write_bytes(other.public_key().public_bytes(pem, spki))
    locked = serialization.BestAvailableEncryption(b"password")
    (tmp_path / "locked").write_bytes(ed25519.Ed25519PrivateKey.generate().private_bytes(pem, pkcs8, locked))
    (tmp_path / "words").write_bytes(b"a secret that no message quotes")
    (tmp_path / "empty").touch()
    (tmp_path / "cut").write_bytes(private.read_bytes()[:70])
    (tmp_path / "cut.pub").write_bytes(public.read_bytes()[:70])
    refused = {
        "private": [public, *(tmp_path / name for name in ("ec", "locked", "words", "empty", "cut", "absent", "."))],
        "public": [private, *(tmp_path / name for name in ("ec.pub", "words", "empty", "cut.pub", "absent", "."))],
    }
    for path in refused["private"]:
        with pytest.raises(InputError, match="Ed25519 private key") as caught:
            sign(DATA, path)
        assert "quotes" not in str(caught.value)
    for path in refused["public"]:
        with pytest.raises(InputError, match="Ed25519 public key"):
            verify(DATA, bytes(SIGNATURE_SIZE), path)
    with pytest.raises(InputError, match="an encrypted key"):
        sign(DATA, tmp_path / "locked")
    with pytest.raises(InputError, match="another kind"):
        verify(DATA, bytes(SIGNATURE_SIZE), tmp_path / "ec.pub")


def test_a_key_that_this_user_may_not_read_is_refused():
    with shared_folder() as folder:
        generate_key(folder / "key", folder / "key.pub")
        run_python(
            "from skipstep.errors import InputError\nimport skipstep.storage.signature as signature\n"
            # Before rights are dropped: packages may lie where only root can read.
            "import cryptography.hazmat.primitives.serialization, cryptography.hazmat.primitives.asymmetric.ed25519\n"
            + DROP_PRIVILEGES
            + f"path = {str(folder / 'key')!r}\n"
            "os.chmod(path, 0) if os.stat(path).st_uid == os.geteuid() else None\n"
            "try:\n    signature.sign(b'', path)\n"
            "except InputError as error:\n    assert 'Permission denied' in str(error), error\n"
            "else:\n    raise AssertionError\n"
        )


def test_importing_costs_nothing_and_absence_is_said():
    """A stand-in for an installation without the package: an entry of None makes an import fail."""
    run_python(
        "import sys, skipstep.storage.signature as signature\n"
        "assert not any(name.startswith('cryptography') for name in sys.modules)\n"
        "sys.modules['cryptography'] = None\n"
        "from skipstep.errors import MissingDependencyError\n"
        "for call in (lambda: signature.sign(b'', 'k'), lambda: signature.verify(b'', b'', 'k'),\n"
        "             lambda: signature.generate_key('k', 'k.pub')):\n"
        "    try:\n        call()\n"
        "    except MissingDependencyError as error:\n        assert 'skipstep[sign]' in str(error)\n"
        "    else:\n        raise AssertionError\n"
    )
