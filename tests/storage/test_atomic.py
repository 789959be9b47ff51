"""Files and folders are whole or absent, wherever a writer fails or is killed."""

import os
import re
import signal
import stat
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
from faults import DROP_PRIVILEGES, file_size_limit, run_on_small_disk, run_python, shared_folder, start_python

from skipstep.errors import StorageError
from skipstep.storage import atomic as files
from skipstep.storage.atomic import atomic_folder, atomic_write


def names(folder):
    return sorted(os.listdir(folder))


def test_writes_whole_data_and_pieces(tmp_path):
    atomic_write(tmp_path / "a", b"whole")
    atomic_write(tmp_path / "b", (bytes([i]) * 70_000 for i in range(3)))
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert (tmp_path / "b").read_bytes() == b"\0" * 70_000 + b"\1" * 70_000 + b"\2" * 70_000
    assert names(tmp_path) == ["a", "b"]


def test_replaces_the_file_and_sets_its_mode(tmp_path):
    path = tmp_path / "a"
    atomic_write(path, b"old")
    with path.open("rb") as reader:
        atomic_write(path, b"new", mode=0o600)
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_link_is_replaced_and_its_target_kept(tmp_path):
    (tmp_path / "target").write_bytes(b"target")
    (tmp_path / "link").symlink_to("target")
    atomic_write(tmp_path / "link", b"new")
    assert (tmp_path / "target").read_bytes() == b"target"
    assert not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_refuses_to_replace_what_is_not_a_file(tmp_path, make):
    make(tmp_path / "there")
    before = os.lstat(tmp_path / "there")
    with pytest.raises(StorageError, match="expected a regular file"):
        atomic_write(tmp_path / "there", b"data")
    assert os.path.samestat(os.lstat(tmp_path / "there"), before)
    assert names(tmp_path) == ["there"]


def test_a_missing_folder_is_named_with_its_remedy(tmp_path):
    with pytest.raises(StorageError, match=r"none/a.*create the folder first"):
        atomic_write(tmp_path / "none/a", b"data")


@pytest.mark.parametrize("kind", ["file", "link to nowhere", "folder"])
@pytest.mark.parametrize("system_call", ["renameat2", "link"])
def test_a_taken_name_is_kept_without_replace(tmp_path, monkeypatch, kind, system_call):
    if system_call == "link":
        monkeypatch.setattr(files, "_renameat2", lambda *arguments: False)
    atomic_write(tmp_path / "free", b"new", replace=False)
    assert (tmp_path / "free").read_bytes() == b"new"
    taken = tmp_path / "taken"
    {"file": taken.touch, "link to nowhere": lambda: taken.symlink_to("nowhere"), "folder": taken.mkdir}[kind]()
    before = os.lstat(taken)
    with pytest.raises(StorageError, match="choose another name") as caught:
        atomic_write(taken, b"new", replace=False)
    assert isinstance(caught.value.__cause__, FileExistsError)
    assert os.path.samestat(os.lstat(taken), before)
    assert names(tmp_path) == ["free", "taken"]


def failing_source():
    yield b"half"
    raise FileNotFoundError("the source is gone")


def full_device():
    yield b"first"
    # The writer's own descriptor now leads to the device that is always full.
    (mine,) = [fd for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink() and ".partial" in os.readlink(fd)]
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, int(mine.name), inheritable=False)
    os.close(full)
    yield b"second"


@pytest.mark.parametrize(
    ("source", "limit", "error", "said"),
    [
        (failing_source, None, FileNotFoundError, "the source is gone"),
        (full_device, None, StorageError, r"No space left on device.*free space"),
        (lambda: b"x" * 20_000, 10_000, StorageError, r"File too large.*/a;.*ulimit -f"),
    ],
    ids=["source", "full device", "size limit"],
)
def test_a_failed_write_keeps_the_old_file(tmp_path, source, limit, error, said):
    atomic_write(tmp_path / "a", b"old")
    with file_size_limit(limit) if limit else nullcontext(), pytest.raises(error, match=said):
        atomic_write(tmp_path / "a", source())
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_full_disk_keeps_old_files_and_folders():
    output = run_on_small_disk("""
import os
from skipstep.errors import StorageError
from skipstep.storage.atomic import atomic_folder, atomic_write
atomic_write("a", b"old")
with atomic_folder("f", replace=True) as folder:
    (folder / "x").write_bytes(b"old")
def fill_file():
    atomic_write("a", b"x" * 1_000_000)
def fill_folder():
    with atomic_folder("f", replace=True) as folder:
        (folder / "x").write_bytes(b"x" * 1_000_000)
for fill in fill_file, fill_folder:
    try:
        fill()
    except StorageError as error:
        print(error)
print(sorted(os.listdir()), open("a").read(), open("f/x").read())
""")
    *errors, state = output.splitlines()
    assert len(errors) == 2
    assert all(re.search("No space left on device.*free space on this disk", error) for error in errors)
    assert state == "['a', 'f'] old old"


def test_a_folder_without_write_permission_is_named_with_its_remedy():
    code = f"""
import sys
from skipstep.errors import StorageError
from skipstep.storage.atomic import atomic_write
{DROP_PRIVILEGES}
try:
    atomic_write(sys.argv[1], b"new")
except StorageError as error:
    print(error)
"""
    with shared_folder() as folder:
        (folder / "a").write_bytes(b"old")
        folder.chmod(0o555)
        output = run_python(code, folder / "a")
        assert re.search("Permission denied.*choose a folder that this user may write to", output)
        assert (folder / "a").read_bytes() == b"old"


HALF_A_FILE = """
import sys, time
from skipstep.storage.atomic import atomic_write
def pieces():
    yield b"x" * 100_000
    print("half", flush=True)
    time.sleep(60)
atomic_write(sys.argv[1], pieces())
"""
HALF_A_FOLDER = """
import sys, time
from pathlib import Path
from skipstep.storage.atomic import atomic_folder
with atomic_folder(sys.argv[1], replace=True) as folder:
    (folder / "inner").mkdir()
    (folder / "inner/x").write_bytes(b"new")
    print("half", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("code", [HALF_A_FILE, HALF_A_FOLDER])
def test_a_killed_writer_leaves_what_the_next_one_removes(tmp_path, code):
    path = tmp_path / "there"
    if code == HALF_A_FILE:
        path.write_bytes(b"old")
    else:
        path.mkdir()
    writer = start_python(code, path)
    assert writer.stdout.readline() == "half\n"
    atomic_write(tmp_path / "other", b"")
    assert len(names(tmp_path)) == 3, "the work of a living writer stays"
    writer.kill()
    writer.communicate()
    assert len(names(tmp_path)) == 3
    assert path.read_bytes() == b"old" if code == HALF_A_FILE else names(path) == []
    atomic_write(tmp_path / "other", b"")
    assert names(tmp_path) == ["other", "there"]


@pytest.mark.parametrize("code", [HALF_A_FILE, HALF_A_FOLDER])
def test_an_interrupted_writer_leaves_nothing(tmp_path, code):
    # A shell that runs the suite in the background has its children ignore the signal.
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{code}"
    writer = start_python(code, tmp_path / "there")
    assert writer.stdout.readline() == "half\n"
    writer.send_signal(signal.SIGINT)
    writer.communicate(timeout=60)
    assert names(tmp_path) == []


def test_the_sweep_leaves_foreign_names_and_links_alone(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / f".skipstep-{'0' * 16}.partial").symlink_to("kept")
    (tmp_path / ".skipstep-notes.partial").write_bytes(b"")
    atomic_write(tmp_path / "a", b"")
    assert len(names(tmp_path)) == 4


def fill(path, content, replace=True, then=None):
    with atomic_folder(path, replace=replace) as folder:
        (folder / "inner").mkdir()
        for name in ("x", "inner/y"):
            (folder / name).write_text(content)
        if then:
            then()


def content(path):
    assert names(path) == ["inner", "x"]
    assert names(path / "inner") == ["y"]
    return (path / "x").read_text(), (path / "inner/y").read_text()


@pytest.mark.parametrize("swap", ["one step", "two renames"])
def test_a_folder_appears_and_is_replaced_whole(tmp_path, monkeypatch, swap):
    if swap == "two renames":
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    fill(tmp_path / "f", "one", replace=False)
    assert content(tmp_path / "f") == ("one", "one")
    fill(tmp_path / "f", "two")
    assert content(tmp_path / "f") == ("two", "two")
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize("killed_between_renames", [False, True])
def test_a_failed_block_leaves_the_old_folder(tmp_path, killed_between_renames):
    fill(tmp_path / "f", "one")
    if killed_between_renames:  # The next writer undoes the first of two renames.
        (tmp_path / "f").rename(tmp_path / ".f.previous")
    with pytest.raises(ZeroDivisionError):
        fill(tmp_path / "f", "two", then=lambda: 1 / 0)
    assert content(tmp_path / "f") == ("one", "one")
    assert names(tmp_path) == ["f"]


def test_a_file_size_limit_inside_the_block_is_a_storage_error(tmp_path):
    limited = pytest.raises(StorageError, match=r"File too large.*ulimit -f")
    with limited, file_size_limit(10_000), atomic_folder(tmp_path / "f", replace=True) as folder:
        (folder / "x").write_bytes(b"x" * 20_000)
    assert names(tmp_path) == []


def test_an_existing_folder_is_refused_unless_replaced(tmp_path):
    fill(tmp_path / "f", "one")
    with pytest.raises(StorageError, match="a folder; expected a free name"):
        fill(tmp_path / "f", "two", replace=False)
    with pytest.raises(StorageError, match="allow the folder to be replaced"):
        fill(tmp_path / "g", "mine", replace=False, then=lambda: fill(tmp_path / "g", "of a faster writer"))
    assert content(tmp_path / "f") == ("one", "one")
    assert content(tmp_path / "g") == ("of a faster writer", "of a faster writer")
    assert names(tmp_path) == ["f", "g"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_only_a_folder_is_replaced(tmp_path, kind):
    fill(tmp_path / "f", "one")
    if kind == "file":
        (tmp_path / "there").write_text("file")
    else:
        (tmp_path / "there").symlink_to("f")
    with pytest.raises(StorageError, match="expected a folder"):
        fill(tmp_path / "there", "two")
    assert content(tmp_path / "f") == ("one", "one")
    assert names(tmp_path) == ["f", "there"]


def test_the_old_folder_returns_if_the_second_rename_fails(tmp_path, monkeypatch):
    fill(tmp_path / "f", "one")
    rename = os.rename

    def failing(source, target):
        if ".partial" in str(source) and not os.path.lexists(target):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(StorageError, match="Input/output error"):
        fill(tmp_path / "f", "two")
    assert content(tmp_path / "f") == ("one", "one")
    assert names(tmp_path) == ["f"]


REPLACE_FOR_EVER = """
import itertools, os, sys
from skipstep.storage.atomic import atomic_folder
print("ready", flush=True)
for i in itertools.count() if sys.argv[2] == "for ever" else range(int(sys.argv[2])):
    with atomic_folder(sys.argv[1], replace=True) as folder:
        (folder / "inner").mkdir()
        for name in ("x", "inner/y"):
            (folder / name).write_text(f"{os.getpid()} {i}")
"""


def test_a_folder_is_whole_whenever_its_writer_is_killed(tmp_path):
    fill(tmp_path / "f", "first")
    for wait in (0.0, 0.003, 0.011, 0.023, 0.037):
        writer = start_python(REPLACE_FOR_EVER, tmp_path / "f", "for ever")
        assert writer.stdout.readline() == "ready\n"
        threading.Event().wait(wait)
        writer.kill()
        writer.communicate()
        x, y = content(tmp_path / "f")
        assert x == y
    fill(tmp_path / "f", "last")
    assert names(tmp_path) == ["f"]


def test_writers_of_one_folder_do_not_mix_and_it_is_never_missing(tmp_path):
    fill(tmp_path / "f", "first")
    writers = [start_python(REPLACE_FOR_EVER, tmp_path / "f", 30) for _ in range(3)]
    while any(writer.poll() is None for writer in writers):
        assert (tmp_path / "f").is_dir()
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    x, y = content(tmp_path / "f")
    assert x == y
    assert names(tmp_path) == ["f"]
