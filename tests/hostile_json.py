"""Untrusted JSON for tests: random values, random changes of a good file, and bundles whose hashes were made to fit."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from skipstep.errors import BundleError

# SKIPSTEP_FUZZ=100000 is the number behind the claims about bundles; `make check` tries 1500, `make test` fewer.
FUZZ = int(os.environ.get("SKIPSTEP_FUZZ", "300"))
KEY, OTHER_KEY = "0123456789abcdef", "fedcba9876543210"

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["loop", "../x", KEY, "b" * 64]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=6,
)


def fuzz(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        value = value[step]
    return value


def changed(contents: Any, path: tuple[Any, ...], value: Any) -> bytes:
    """The JSON of `contents`, which is changed, with another value in that place."""
    at(contents, path[:-1])[path[-1]] = value
    return json.dumps(contents).encode()


def random_changes(contents: Any) -> st.SearchStrategy[bytes]:
    """The JSON of `contents` with up to three values replaced, removed or added."""
    places_to_change = [path for path in places(contents) if path]
    changes = st.lists(
        st.tuples(st.sampled_from(places_to_change), st.sampled_from(["replace", "remove", "add"]), JSON), max_size=3
    )
    return changes.map(lambda chosen: _apply(contents, chosen))


def _apply(contents: Any, changes: list[tuple[tuple[Any, ...], str, Any]]) -> bytes:
    contents = copy.deepcopy(contents)
    for path, how, value in changes:
        try:
            place = at(contents, path[:-1])
            if how == "replace":
                place[path[-1]] = copy.deepcopy(value)
            elif how == "remove":
                del place[path[-1]]
            else:
                place["added"] = value
        except (KeyError, IndexError, TypeError):
            continue
    return json.dumps(contents).encode()


def check_read_or_refused(data: bytes, read: Callable[[bytes], Any], write: Callable[[Any], bytes]) -> None:
    """`data` is refused with a BundleError, or what is read of it survives being written and read again."""
    try:
        value = read(data)
    except BundleError:
        return
    assert read(write(value)) == value


def rewrite(folder: Path, name: str, data: bytes) -> None:
    """Replace a bundle's file and its entry in the manifest, as an attacker would."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
