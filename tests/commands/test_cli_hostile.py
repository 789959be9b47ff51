"""The command line where its surroundings fail: no traceback, and what cannot work is said before work is done."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import file_size_limit

from skipstep.commands.main import main
from skipstep.demo import SHIPPED_BUNDLE, SHIPPED_MODEL
from skipstep.errors import StorageError
from skipstep.storage.atomic import check_writable

MODULE = (sys.executable, "-m", "skipstep")
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
PRINTING = (("--help",), ("sample", "--help"), ("inspect", str(SHIPPED_BUNDLE)), ("--version",))


def run(*arguments, **options):
    started = time.perf_counter()
    ended = subprocess.run(
        [*MODULE, *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        **{"stdout": -1, "env": BUFFERED, **options},
    )
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended, time.perf_counter() - started


@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_a_reader_that_goes(arguments):
    read, write = os.pipe()
    os.close(read)
    try:
        ended, _ = run(*arguments, stdout=write)
    finally:
        os.close(write)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_a_full_disk(arguments):
    with open("/dev/full", "w") as full:
        ended, _ = run(*arguments, stdout=full)
    assert ended.returncode == 2
    assert "standard output cannot be written: No space left" in ended.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_our_characters(encoding):
    ended, _ = run("inspect", SHIPPED_BUNDLE, env={**os.environ, "PYTHONIOENCODING": encoding}, encoding=encoding)
    assert ended.returncode == 0
    assert "28" in ended.stdout


@pytest.mark.parametrize("seconds", [0.15, 0.3, 0.6])
def test_an_interruption_while_packages_are_imported(seconds, tmp_path):
    process = subprocess.Popen(
        [*MODULE, "sample", "--model", SHIPPED_MODEL, "--backend", "torch", "--out", tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    # Before our first line the interpreter itself answers, and ends by the signal.
    if process.returncode >= 0:
        assert process.returncode == 130
        assert "Traceback" not in err


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.touch()
    return path


def nowhere(file: Path) -> dict[str, tuple[str, ...]]:
    """Commands whose results would have no place: a file stands where a folder would be."""
    place = str(file / "below" / "it")
    return {
        "sample": ("sample", "--out", place),
        "export": ("export", "--license", "none", "--out", place),
        "evaluate": ("evaluate", "--out", place),
        "report": ("report", "no.json", "--out", place),
        "bench": ("bench", "--quick", "--out", place),
        "compare": ("compare", "no", "no.json", "--out", place),
    }


@pytest.mark.parametrize("name", ["sample", "export", "evaluate", "report", "bench", "compare"])
def test_a_result_without_a_place_is_refused_before_the_work(name, file, capsys):
    started = time.perf_counter()
    assert main(nowhere(file)[name]) == 2
    assert time.perf_counter() - started < 5
    assert "Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ("--target", "nosuch"),
        ("--target", "rtx:sm12345"),
        ("--steps", "0"),
        ("--steps", "5000"),
        ("--eta", "2"),
        ("--batch", "0"),
        ("--license", " "),
        ("--sign", "no-such-key.pem"),
    ],
    ids=" ".join,
)
def test_an_export_that_cannot_work_is_refused_before_compiling(arguments, tmp_path):
    ended, seconds = run("export", "--license", "none", "--out", tmp_path / "bundle", *arguments)
    assert ended.returncode == 2
    assert "Remedy" in ended.stderr
    assert "[" not in ended.stderr.split("Error")[0]  # No phase of work was reported.
    assert seconds < 10
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_while_pictures_are_written(tmp_path, capsys):
    with file_size_limit(300):
        assert main(["sample", "--steps", "10", "--num", "1", "--out", str(tmp_path / "out")]) == 2
    assert "StorageError" in capsys.readouterr().err


def test_looking_changes_nothing(tmp_path):
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path)
    with pytest.raises(StorageError):
        check_writable(tmp_path / "missing", may_be_missing=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user, as only root can")
def test_a_folder_of_another_user(tmp_path):
    """As somebody who may not write there, which root may everywhere."""
    tmp_path.chmod(0o755)
    for above in tmp_path.parents:
        if above.stat().st_uid == os.getuid() and above != Path("/"):
            above.chmod(above.stat().st_mode | 0o055)
    code = (
        "import os, sys, tempfile\n"
        "from skipstep.storage.atomic import atomic_write, atomic_folder, check_writable\n"
        "from skipstep.errors import StorageError\n"
        "os.setgid(65534); os.setuid(65534); path = sys.argv[1]\n"
        "for attempt in (lambda: atomic_write(path + '/file', b'x'), lambda: check_writable(path + '/new'),\n"
        "                lambda: atomic_folder(path + '/folder', replace=False).__enter__()):\n"
        "    try: attempt()\n"
        "    except StorageError as error: assert 'this user may write to' in str(error), error\n"
        "    else: raise SystemExit('it was written')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert not list(tmp_path.iterdir())
