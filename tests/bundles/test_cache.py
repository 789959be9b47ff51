import os
import stat
import subprocess
import time

import pytest
from cache_cases import HEAD_BYTES, KEY, OTHER, never, path_of
from faults import start_python
from hypothesis import example, given
from hypothesis import strategies as st

from skipstep.bundles.cache import ArtefactCache, default_folder
from skipstep.bundles.cache_key import cache_key
from skipstep.errors import CacheError, InputError

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3) | st.binary(max_size=3)
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=5)
part_sets = st.dictionaries(st.sampled_from(["a", "b", "ab", "c"]), values, min_size=1)


def typed(value):
    """A form that Python compares by type as well: 1 == 1.0 == True otherwise, and 0.0 == -0.0."""
    return tuple(map(typed, value)) if isinstance(value, tuple) else (type(value).__name__, repr(value))


@given(part_sets, part_sets)
@example({"a": ("ab", "c")}, {"a": ("a", "bc")})
@example({"a": (("x",), "y")}, {"a": ("x", ("y",))})
@example({"a": 1}, {"a": True})
@example({"a": 1}, {"a": 1.0})
@example({"a": 0.0}, {"a": -0.0})
@example({"a": "1"}, {"a": b"1"})
@example({"a": None}, {"a": ()})
@example({"a": "b", "c": ""}, {"a": "", "c": "b"})
def test_keys_are_equal_only_for_equal_parts(left, right):
    same = {name: typed(value) for name, value in left.items()} == {n: typed(v) for n, v in right.items()}
    assert (cache_key(**left) == cache_key(**right)) == same


def test_a_key_ignores_order_and_counts_the_shape():
    key = cache_key(graph="unet", shape=(1, 3, 32, 32), flags=("fp16",))
    assert key == cache_key(flags=("fp16",), shape=(1, 3, 32, 32), graph="unet")
    assert key != cache_key(graph="unet", shape=(1, 3, 32, 64), flags=("fp16",))
    assert key != cache_key(graph="unet", shape=(1, 3, 323, 2), flags=("fp16",))


@pytest.mark.parametrize("parts", [{}, {"a": [1]}, {"a": ({},)}, {"a": object()}])
def test_a_key_of_nothing_or_of_other_types_is_refused(parts):
    with pytest.raises(InputError):
        cache_key(**parts)


@pytest.mark.parametrize("key", ["", "../x", "a" * 63, "A" * 64, f"{KEY}\n", "/" + KEY[1:]])
def test_what_is_not_a_key_is_refused(cache, key):
    for call in (cache.get, cache.clear, lambda k: cache.put(k, b"", ""), lambda k: cache.get_or_build(k, never, "")):
        with pytest.raises(InputError, match="64 hexadecimal digits"):
            call(key)
    assert not cache.folder.exists()


def test_the_default_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("SKIPSTEP_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert str(default_folder()) == "/home/somebody/.cache/skipstep"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert str(default_folder()) == "/home/somebody/.cache/skipstep"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(default_folder()) == "/xdg/skipstep"
    monkeypatch.setenv("SKIPSTEP_CACHE", "~/own")
    assert str(ArtefactCache().folder) == "/home/somebody/own"


def test_stores_and_returns_artefacts(cache):
    assert cache.get(KEY) is None
    assert cache.entries() == []
    assert not cache.folder.exists(), "asking leaves no trace"
    data = bytes(range(256)) * 1000
    cache.put(KEY, data, "a network\nfor \x1b[31msm_87")
    cache.put(OTHER, b"", "empty")
    assert cache.get(KEY) == data
    assert cache.get(OTHER) == b""
    entries = {entry.key: entry for entry in cache.entries()}
    assert entries[KEY].description == "a network for ?[31msm_87"
    assert entries[KEY].bytes == path_of(cache).stat().st_size
    assert abs(entries[KEY].last_used - time.time()) < 60
    cache.put(KEY, b"newer", "replaced")
    assert cache.get(KEY) == b"newer"


def test_builds_once(cache):
    assert cache.get_or_build(KEY, lambda: b"data", "") == b"data"
    assert cache.get_or_build(KEY, never, "") == b"data"
    assert ArtefactCache(cache.folder).get_or_build(KEY, never, "") == b"data"


def test_an_error_of_the_build_passes_through_and_frees_the_lock(cache):
    def build():
        raise FileNotFoundError("no compiler")

    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="no compiler"):
            cache.get_or_build(KEY, build, "")
    assert os.listdir(cache.folder) == []
    assert cache.get_or_build(KEY, lambda: b"data", "") == b"data"


def test_lists_and_clears(cache):
    for key in (KEY, OTHER):
        cache.put(key, b"data", f"entry {key[:4]}")
    os.utime(path_of(cache, OTHER), (1, 1))
    assert [(e.key, e.description) for e in cache.entries()] == [(k, f"entry {k[:4]}") for k in (KEY, OTHER)]
    assert cache.clear(KEY) == 1
    assert cache.clear(KEY) == 0
    assert [entry.key for entry in cache.entries()] == [OTHER]
    assert cache.clear() == 1
    assert os.listdir(cache.folder) == []


def test_the_folder_and_its_files_are_private(cache):
    before = os.umask(0)
    try:
        cache.put(KEY, b"data", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(path_of(cache).stat().st_mode) == 0o600


def test_a_folder_that_others_may_write_is_closed_to_them(cache):
    cache.put(KEY, b"data", "")
    cache.folder.chmod(0o777)
    assert cache.get(KEY) == b"data"
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700


def test_the_least_recently_used_make_room(tmp_path):
    cache = ArtefactCache(tmp_path, max_bytes=3 * (HEAD_BYTES + 1000))
    keys = [cache_key(i=i) for i in range(4)]
    for age, key in enumerate(keys[:3]):
        cache.put(key, bytes(1000), "")
        os.utime(path_of(cache, key), (age + 1, age + 1))
    assert cache.get(keys[0]) is not None, "a use makes it the most recent"
    cache.put(keys[3], bytes(1000), "")
    assert {entry.key for entry in cache.entries()} == {keys[0], keys[2], keys[3]}
    assert sum(entry.bytes for entry in cache.entries()) <= cache.max_bytes
    cache.put(keys[3], bytes(1000), "")
    assert len(cache.entries()) == 3, "an entry that is replaced needs no room of its own"


def test_what_is_larger_than_the_cache_evicts_nothing(tmp_path):
    cache = ArtefactCache(tmp_path, max_bytes=1000)
    cache.put(KEY, b"kept", "")
    with pytest.raises(CacheError, match="raise max_bytes"):
        cache.put(OTHER, bytes(1000), "")
    with pytest.warns(RuntimeWarning, match="raise max_bytes"):
        assert cache.get_or_build(OTHER, lambda: bytes(1000), "") == bytes(1000)
    assert cache.get(KEY) == b"kept"


def test_what_is_locked_is_not_evicted(tmp_path):
    cache = ArtefactCache(tmp_path / "cache", max_bytes=2 * (HEAD_BYTES + 1000))
    for key in (KEY, OTHER):
        cache.put(key, bytes(1000), "")
    os.utime(path_of(cache, KEY), (1, 1))
    code = """
import sys
from skipstep.bundles.cache import ArtefactCache
with ArtefactCache(sys.argv[1])._locked(sys.argv[2]):
    print("locked", flush=True)
    sys.stdin.read()
"""
    holder = start_python(code, cache.folder, KEY, stdin=subprocess.PIPE)
    assert holder.stdout.readline() == "locked\n"
    third = cache_key(name="third")
    cache.put(third, bytes(1000), "")
    assert {entry.key for entry in cache.entries()} == {KEY, third}, "the oldest is locked, so the next one goes"
    holder.communicate("")
    cache.put(OTHER, bytes(1000), "")
    assert {entry.key for entry in cache.entries()} == {OTHER, third}
