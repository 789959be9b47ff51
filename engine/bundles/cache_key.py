"""Keys of the artefact cache: sha256 over named parts, encoded so that no two sets of parts share an encoding."""

from __future__ import annotations

import hashlib
import struct

from skipstep.errors import InputError

Part = str | bytes | int | float | tuple["Part", ...] | None


def cache_key(**parts: Part) -> str:
    """sha256 (hex) over named parts: every name, type, length and value counts, their order does not.

    Each value is written as type, length, bytes, so no two sets of parts share an encoding: 1, 1.0, True and "1"
    differ, and so do ("ab", "c") and ("a", "bc"). Raises InputError for other types and for no parts at all.
    """
    if not parts:
        raise InputError(got="no parts", expected="all that the artefact depends on", remedy="name them as keywords")
    named = tuple((name, parts[name]) for name in sorted(parts))
    return hashlib.sha256(b"skipstep cache key 1" + _encode(named)).hexdigest()


def _encode(value: object) -> bytes:
    """Type, length and bytes of a part; a tuple's bytes are its encoded items."""
    if value is None:
        tag, body = b"n", b""
    elif isinstance(value, str):
        tag, body = b"s", value.encode("utf-8", "surrogatepass")
    elif isinstance(value, bytes):
        tag, body = b"b", value
    elif isinstance(value, bool):
        tag, body = b"t", bytes([value])
    elif isinstance(value, int):
        tag, body = b"i", value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)
    elif isinstance(value, float):
        tag, body = b"f", struct.pack(">d", value)
    elif isinstance(value, tuple):
        tag, body = b"(", b"".join(map(_encode, value))
    else:
        raise InputError(
            got=f"a {type(value).__name__} as part of a cache key",
            expected="str, bytes, int, float, None or tuples of them",
            remedy="convert it; of large data pass the sha256",
        )
    return tag + struct.pack(">Q", len(body)) + body
