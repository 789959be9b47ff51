"""The cache where something is damaged, forbidden, full, killed or built by several processes at once."""

import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from cache_cases import HEAD_BYTES, KEY, OTHER, never, path_of
from faults import DROP_PRIVILEGES, file_size_limit, run_on_small_disk, run_python, shared_folder, start_python

from skipstep.bundles.cache import ArtefactCache
from skipstep.errors import CacheError, StorageError


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def truncate(size):
    return lambda cache: os.truncate(path_of(cache), size)


def link_entry(make):
    def change(cache):
        path_of(cache).rename(cache.folder / "moved")
        make(cache.folder / "moved", path_of(cache))

    return change


DAMAGES = {
    "empty": truncate(0),
    "cut in the head": truncate(50),
    "cut after the head": truncate(HEAD_BYTES),
    "cut by one byte": lambda cache: os.truncate(path_of(cache), path_of(cache).stat().st_size - 1),
    "one byte more": lambda cache: path_of(cache).write_bytes(path_of(cache).read_bytes() + b"x"),
    "swapped": lambda cache: os.replace(path_of(cache, OTHER), path_of(cache)),
    "another's": lambda cache: os.chown(path_of(cache), 12345, 12345),
    "writable by the group": lambda cache: path_of(cache).chmod(0o660),
    "writable by all": lambda cache: path_of(cache).chmod(0o606),
    "symbolic link": link_entry(os.symlink),
    "hard link": link_entry(os.link),
    "pipe": lambda cache: (path_of(cache).unlink(), os.mkfifo(path_of(cache))),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_a_miss_and_is_built_again(cache, damage):
    if damage == "another's" and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    for key in (KEY, OTHER):
        cache.put(key, b"data of " + key.encode(), "")
    DAMAGES[damage](cache)
    assert cache.get(KEY) is None
    assert not os.path.lexists(path_of(cache))
    assert cache.get_or_build(KEY, lambda: b"again", "") == b"again"
    assert cache.get(KEY) == b"again"


def test_every_flipped_bit_of_an_entry_is_a_miss(cache):
    cache.put(KEY, b"data", "text")
    size = path_of(cache).stat().st_size
    assert size == HEAD_BYTES + 8
    for position in range(size):
        cache.put(KEY, b"data", "text")
        flip(path_of(cache), position)
        assert cache.entries(), "listing survives damage"
        assert cache.get(KEY) is None


@pytest.mark.parametrize("kind", ["link", "link to nothing", "file", "below a file", "another's"])
def test_a_folder_that_cannot_be_trusted_costs_a_warning_and_no_artefact(tmp_path, kind):
    folder = tmp_path / "cache"
    if kind == "link":
        (tmp_path / "real").mkdir()
        folder.symlink_to("real")
    elif kind == "link to nothing":
        folder.symlink_to("nothing")
    elif kind == "file":
        folder.write_bytes(b"")
    elif kind == "below a file":
        (tmp_path / "file").write_bytes(b"")
        folder = tmp_path / "file/cache"
    elif os.geteuid() == 0:
        folder.mkdir()
        os.chown(folder, 12345, 12345)
    else:
        folder = "/"
    cache = ArtefactCache(folder)
    for call in (lambda: cache.get(KEY), lambda: cache.put(KEY, b"", ""), cache.entries, cache.clear):
        with pytest.raises(CacheError, match="Remedy: set SKIPSTEP_CACHE to a folder of your own"):
            call()
    with pytest.warns(RuntimeWarning, match="set SKIPSTEP_CACHE"):
        assert cache.get_or_build(KEY, lambda: b"data", "") == b"data"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.get_or_build(KEY, lambda: b"data", "") == b"data", "and it warns once"


def test_no_home_costs_a_warning_and_no_artefact(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "SKIPSTEP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987654321)
    with pytest.warns(RuntimeWarning, match=r"no home folder.*set SKIPSTEP_CACHE"):
        assert ArtefactCache().get_or_build(KEY, lambda: b"data", "") == b"data"
    assert os.listdir(tmp_path) == []


def test_a_file_size_limit_costs_a_warning_and_no_artefact(cache):
    cache.put(OTHER, b"kept", "")
    data = b"x" * 20_000
    with file_size_limit(10_000):
        with pytest.warns(RuntimeWarning, match=r"not kept.*File too large.*ulimit -f"):
            assert cache.get_or_build(KEY, lambda: data, "") == data
        with pytest.raises(StorageError):
            cache.put(KEY, data, "")
    assert os.listdir(cache.folder) == [f"{OTHER}.entry"]
    assert cache.get(OTHER) == b"kept"
    assert cache.get_or_build(KEY, lambda: data, "") == data
    assert cache.get(KEY) == data


def test_a_full_disk_costs_a_warning_and_no_artefact():
    output = run_on_small_disk("""
import os, warnings
from skipstep.bundles.cache import ArtefactCache
from skipstep.bundles.cache_key import cache_key
cache = ArtefactCache("cache")
a, b = cache_key(a=1), cache_key(a=2)
cache.put(a, b"old", "")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert cache.get_or_build(b, lambda: b"x" * 1_000_000, "") == b"x" * 1_000_000
    assert cache.get_or_build(a, lambda: b"new", "") == b"old"
print(*(warning.message for warning in caught), os.listdir("cache") == [a + ".entry"])
""")
    assert "No space left on device" in output
    assert "free space on this disk" in output
    assert output.endswith("True\n")


def test_a_read_only_folder_still_gives_what_it_holds():
    code = f"""
import os, sys, warnings
from skipstep.bundles.cache import ArtefactCache
{DROP_PRIVILEGES}
key, other = sys.argv[2:]
cache = ArtefactCache(sys.argv[1] + "/cache")
cache.put(key, b"kept", "")
os.chmod(cache.folder, 0o500)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(cache.get_or_build(key, lambda: b"built", ""), len(caught))
    print(cache.get_or_build(other, lambda: b"built", ""), cache.get_or_build(other, lambda: b"built", ""))
print(len(caught), caught[0].message)
os.chmod(cache.folder, 0o700)
"""
    with shared_folder() as folder:
        folder.chmod(0o777)
        lines = run_python(code, folder, KEY, OTHER).splitlines()
    assert lines[:2] == ["b'kept' 0", "b'built' b'built'"]
    assert lines[2].startswith("1 the artefact is built but not kept: got 'Permission denied'")


def test_a_read_only_disk_gives_what_others_may_read_but_not_write():
    output = run_on_small_disk("""
import os, subprocess
from skipstep.bundles.cache import ArtefactCache
from skipstep.bundles.cache_key import cache_key
from skipstep.errors import CacheError
key = cache_key(a=1)
for mode in (0o755, 0o775):
    subprocess.run(["mount", "-o", "remount,bind,rw", os.getcwd()], check=True)
    cache = ArtefactCache("cache")
    cache.put(key, b"data", "")
    os.chmod("cache", mode)
    subprocess.run(["mount", "-o", "remount,bind,ro", os.getcwd()], check=True)
    try:
        print(cache.get(key))
    except CacheError as error:
        print(error)
""")
    first, second = output.splitlines()
    assert first == "b'data'"
    assert "Read-only file system" in second


BUILD = """
import os, sys, time
from skipstep.bundles.cache import ArtefactCache
folder, key, log, seconds = sys.argv[1:]
def build():
    with open(log, "a") as file:
        file.write("built\\n")
    print("building", flush=True)
    time.sleep(float(seconds))
    return b"data" * 10_000
data = ArtefactCache(folder).get_or_build(key, build, "")
assert data == b"data" * 10_000
print("done", flush=True)
"""


def test_processes_that_build_one_key_at_once_build_it_once(tmp_path):
    log = tmp_path / "log"
    builders = [start_python(BUILD, tmp_path / "cache", KEY, log, 0.5) for _ in range(4)]
    outputs = [builder.communicate(timeout=60)[0] for builder in builders]
    assert [builder.returncode for builder in builders] == [0] * 4
    assert sorted(outputs) == ["building\ndone\n"] + ["done\n"] * 3
    assert log.read_text() == "built\n"
    assert os.listdir(tmp_path / "cache") == [f"{KEY}.entry"]


def test_builds_of_one_key_that_fail_never_overlap(cache):
    inside, overlaps = [], []

    def build():
        inside.append(None)
        overlaps.append(len(inside))
        time.sleep(0.002)
        inside.pop()
        raise ZeroDivisionError

    def ask(_):
        with pytest.raises(ZeroDivisionError):
            cache.get_or_build(KEY, build, "")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(80)))
    assert overlaps == [1] * 80


def test_a_killed_builder_leaves_nothing_to_trust_and_its_lock_is_free(tmp_path):
    log = tmp_path / "log"
    builder = start_python(BUILD, tmp_path / "cache", KEY, log, 60)
    assert builder.stdout.readline() == "building\n"
    waiter = start_python(BUILD, tmp_path / "cache", KEY, log, 0)
    builder.kill()
    builder.communicate()
    assert waiter.communicate(timeout=60)[0] == "building\ndone\n"
    assert log.read_text() == "built\n" * 2
    assert ArtefactCache(tmp_path / "cache").get_or_build(KEY, never, "") == b"data" * 10_000


def test_a_writer_killed_at_any_time_leaves_whole_entries_only(cache):
    code = """
import itertools, sys
from skipstep.bundles.cache import ArtefactCache
cache = ArtefactCache(sys.argv[1])
print("ready", flush=True)
for i in itertools.count():
    cache.put(sys.argv[2], bytes([i % 256]) * 3_000_000, "")
"""
    for wait in (0.002, 0.01, 0.021, 0.034):
        writer = start_python(code, cache.folder, KEY)
        assert writer.stdout.readline() == "ready\n"
        time.sleep(wait)
        writer.kill()
        writer.communicate()
        there = path_of(cache).exists()
        data = cache.get(KEY)
        assert (data is not None) == there
        assert data is None or data == data[:1] * 3_000_000
    cache.put(OTHER, b"", "the next writer cleans up")
    assert not [name for name in os.listdir(cache.folder) if "partial" in name]
