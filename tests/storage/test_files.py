import hashlib
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from faults import DROP_PRIVILEGES, file_size_limit, run_on_small_disk, shared_folder
from hypothesis import example, given
from hypothesis import strategies as st

from skipstep.errors import IntegrityError, StorageError
from skipstep.storage import atomic as files
from skipstep.storage.atomic import atomic_folder, atomic_write, check_relative_name, read_verified, sha256_file


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def names(folder):
    return sorted(os.listdir(folder))


def start(code, *arguments):
    """A Python process that runs `code`; it says on stdout how far it is."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


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


def test_an_error_of_the_data_source_passes_through_and_leaves_nothing(tmp_path):
    def source():
        yield b"half"
        raise FileNotFoundError("the source is gone")

    atomic_write(tmp_path / "a", b"old")
    with pytest.raises(FileNotFoundError, match="the source is gone"):
        atomic_write(tmp_path / "a", source())
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_file_size_limit_keeps_the_old_file(tmp_path):
    atomic_write(tmp_path / "a", b"old")
    with file_size_limit(10_000), pytest.raises(StorageError, match=r"File too large.*/a;.*ulimit -f"):
        atomic_write(tmp_path / "a", b"x" * 20_000)
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_full_device_keeps_the_old_file(tmp_path):
    def pieces():
        yield b"first"
        # The writer's own descriptor now leads to the device that is always full.
        (mine,) = [fd for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink() and ".partial" in os.readlink(fd)]
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, int(mine.name), inheritable=False)
        os.close(full)
        yield b"second"

    atomic_write(tmp_path / "a", b"old")
    with pytest.raises(StorageError, match=r"No space left on device.*free space"):
        atomic_write(tmp_path / "a", pieces())
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
        output = start(code, folder / "a").communicate(timeout=60)[0]
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
    writer = start(code, path)
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
    writer = start(code, tmp_path / "there")
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


def fail():
    raise ZeroDivisionError


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


def test_a_failed_block_leaves_the_old_folder(tmp_path):
    fill(tmp_path / "f", "one")
    with pytest.raises(ZeroDivisionError):
        fill(tmp_path / "f", "two", then=fail)
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


def test_a_writer_killed_between_two_renames_is_undone_by_the_next(tmp_path):
    fill(tmp_path / "f", "one")
    (tmp_path / "f").rename(tmp_path / ".f.previous")
    with pytest.raises(ZeroDivisionError):
        fill(tmp_path / "f", "two", then=fail)
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
        writer = start(REPLACE_FOR_EVER, tmp_path / "f", "for ever")
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
    writers = [start(REPLACE_FOR_EVER, tmp_path / "f", 30) for _ in range(3)]
    while any(writer.poll() is None for writer in writers):
        assert (tmp_path / "f").is_dir()
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    x, y = content(tmp_path / "f")
    assert x == y
    assert names(tmp_path) == ["f"]


hostile_text = st.text(st.sampled_from("abC./\\:~ \0\n\ud800é"), max_size=12)
hostile_paths = st.lists(st.sampled_from(["..", ".", "", "a", "b.onnx", "link", "C:", "c:x", "~", "...", " .."])).map(
    "/".join
)


@given(hostile_text | hostile_paths | st.text() | st.none() | st.integers())
@example("../x")
@example("a/../../x")
@example("/etc/passwd")
@example("C:\\x")
def test_an_accepted_name_stays_below_any_root(name):
    try:
        accepted = check_relative_name(name)
    except IntegrityError:
        return
    for root in (PurePosixPath("/some/root"), PureWindowsPath("D:\\some\\root")):
        path = root / accepted
        assert path.is_relative_to(root)
        assert path != root
        assert ".." not in path.parts
    assert os.path.normpath(f"/r/{accepted}") == f"/r/{accepted}"
    os.fsencode(accepted)


@pytest.mark.parametrize("name", ["a", "a/b.onnx", ".hidden", "..a", "a..", "rtx:sm86/engine", "übung.bin", "a b"])
def test_plain_names_are_accepted(name):
    assert check_relative_name(name) == name


DATA = bytes(range(256)) * 40


@pytest.fixture
def root(tmp_path):
    """A folder with one promised file, beside a file that it must never return."""
    (tmp_path / "root/sub").mkdir(parents=True)
    (tmp_path / "root/sub/file").write_bytes(DATA)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_bytes(DATA)
    return tmp_path / "root"


def read(root, name="sub/file", data=DATA):
    return read_verified(root, name, size=len(data), sha256=sha256(data))


def test_reads_what_was_promised(root):
    assert read(root) == DATA
    (root / "empty").touch()
    assert read(root, "empty", b"") == b""
    assert sha256_file(root / "sub/file") == sha256(DATA)


@pytest.mark.parametrize("damage", [DATA[:-1], DATA + b"x", DATA[:100] + b"\xff" + DATA[101:], b"", DATA[::-1]])
def test_other_bytes_are_refused(root, damage):
    (root / "sub/file").write_bytes(damage)
    with pytest.raises(IntegrityError, match=r"sub/file': (\d+ bytes|sha256 [0-9a-f]{64}); expected .* Remedy"):
        read(root)


def test_a_missing_file_folder_or_root_is_refused(root):
    for folder, name in ((root, "sub/none"), (root, "none/file"), (root / "none", "file")):
        with pytest.raises(IntegrityError, match=r"no such file.*complete or repeat the download or copy"):
            read(folder, name)


@pytest.mark.parametrize("target", ["../../outside/file", "real"])
def test_a_linked_file_is_refused(root, target):
    (root / "sub/file").rename(root / "sub/real")
    (root / "sub/file").symlink_to(target)
    with pytest.raises(IntegrityError, match="symbolic link"):
        read(root)


@pytest.mark.parametrize("target", ["../outside", "real"])
def test_a_linked_folder_is_refused(root, target):
    (root / "sub").rename(root / "real")
    (root / "sub").symlink_to(target)
    with pytest.raises(IntegrityError, match="symbolic link"):
        read(root)


def test_a_hard_link_is_refused_unless_allowed(root):
    (root / "sub/file").unlink()
    (root / "sub/file").hardlink_to(root.parent / "outside/file")
    with pytest.raises(IntegrityError, match=r"2 hard links.*cp -r"):
        read(root)
    data = read_verified(root, "sub/file", size=len(DATA), sha256=sha256(DATA), allow_hard_links=True)
    assert data == DATA


@pytest.mark.timeout(10)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_not_a_file_is_refused_without_waiting(root, make):
    (root / "sub/file").unlink()
    make(root / "sub/file")
    with pytest.raises(IntegrityError, match="expected a regular file"):
        read(root)


@pytest.mark.parametrize("name", ["../outside/file", "sub/../sub/file", "./sub/file", "sub//file", "a" * 300])
def test_a_name_that_leads_elsewhere_is_refused(root, name):
    with pytest.raises(IntegrityError):
        read(root, name)
    with pytest.raises(IntegrityError):
        read(root, str(root / "sub/file"))


def test_a_file_longer_than_it_says_is_not_read_to_its_end():
    # procfs files say that they are empty.
    with pytest.raises(IntegrityError, match="1 bytes or more; expected 0 bytes"):
        read("/proc/self", "status", b"")


@given(hostile_paths | hostile_text)
def test_no_name_reads_what_is_outside(tmp_path_factory, name):
    base = tmp_path_factory.getbasetemp() / "hostile"
    if not base.exists():
        (base / "root/a").mkdir(parents=True)
        for path in ("b.onnx", "root/b.onnx", "root/a/b.onnx"):
            (base / path).write_bytes(b"1" if path.startswith("root") else b"0")
        (base / "root/link").symlink_to(base)
        (base / "root/a/link").symlink_to(base / "b.onnx")
    with pytest.raises(IntegrityError):
        read(base / "root", name, b"0")


def test_a_file_that_changes_while_it_is_read_never_passes_unverified(root):
    other = DATA[::-1]
    stop = threading.Event()

    def change():
        while not stop.is_set():
            for data in (other, DATA):
                with open(root / "sub/file", "r+b", buffering=0) as file:
                    file.write(data)

    thread = threading.Thread(target=change)
    thread.start()
    outcomes = set()
    try:
        for _ in range(2000):
            try:
                outcomes.add(read(root) == DATA)
            except IntegrityError:
                outcomes.add("refused")
    finally:
        stop.set()
        thread.join()
    assert False not in outcomes
    assert "refused" in outcomes
