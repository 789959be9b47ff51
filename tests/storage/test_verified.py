"""Verified reads: the promised bytes or an error, whatever lies in the folder."""

import hashlib
import os
import threading
from pathlib import PurePosixPath, PureWindowsPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from skipstep.errors import IntegrityError
from skipstep.storage.verified import check_relative_name, read_below, read_verified

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


def read(root, name="sub/file", data=DATA, **options):
    return read_verified(root, name, size=len(data), sha256=hashlib.sha256(data).hexdigest(), **options)


def test_reads_what_was_promised(root):
    assert read(root) == DATA
    (root / "empty").touch()
    assert read(root, "empty", b"") == b""


@pytest.mark.parametrize("damage", [DATA[:-1], DATA + b"x", DATA[:100] + b"\xff" + DATA[101:], b"", DATA[::-1]])
def test_other_bytes_are_refused(root, damage):
    (root / "sub/file").write_bytes(damage)
    with pytest.raises(IntegrityError, match=r"sub/file': (\d+ bytes|sha256 [0-9a-f]{64}); expected .* Remedy"):
        read(root)


def test_a_missing_file_folder_or_root_is_refused(root):
    for folder, name in ((root, "sub/none"), (root, "none/file"), (root / "none", "file")):
        with pytest.raises(IntegrityError, match=r"no such file.*complete or repeat the download or copy"):
            read(folder, name)


@pytest.mark.parametrize(
    ("linked", "target"),
    [("sub/file", "../../outside/file"), ("sub/file", "../real"), ("sub", "../outside"), ("sub", "real")],
)
def test_a_linked_file_or_folder_is_refused(root, linked, target):
    (root / linked).rename(root / "real")
    (root / linked).symlink_to(target)
    with pytest.raises(IntegrityError, match="symbolic link"):
        read(root)


def test_a_hard_link_is_refused_unless_allowed(root):
    (root / "sub/file").unlink()
    (root / "sub/file").hardlink_to(root.parent / "outside/file")
    with pytest.raises(IntegrityError, match=r"2 hard links.*cp -r"):
        read(root)
    data = read_verified(
        root, "sub/file", size=len(DATA), sha256=hashlib.sha256(DATA).hexdigest(), allow_hard_links=True
    )
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


def test_read_below_stays_in_its_folder(tmp_path):
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    (root / "inner/file").write_bytes(b"content")
    (tmp_path / "secret").write_bytes(b"secret")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "folder").symlink_to(tmp_path)
    assert read_below(root, "inner/file", limit=100) == b"content"
    assert read_below(root, "inner/file", limit=3) == b"con"
    for name in ("../secret", "/etc/passwd", "link", "folder/secret", "inner", "missing", "inner/../../secret", ""):
        with pytest.raises(IntegrityError):
            read_below(root, name, limit=100)
