"""Real faults for the tests of files and caches: a full disk, a file size limit, a user without rights."""

import resource
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

# Permissions do not bind root. To be run after the imports: the packages may lie where only root can read.
DROP_PRIVILEGES = """
import os
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
"""

DISK_BYTES = 256 << 10


@contextmanager
def file_size_limit(size):
    """Inside, no file of this process grows beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def run_on_small_disk(code):
    """Run Python `code` in a folder that is a disk of DISK_BYTES; its stdout. Skips where nobody may mount one."""
    mount = f'mount -t tmpfs -o size={DISK_BYTES} none "$1" && cd "$1" && '
    with tempfile.TemporaryDirectory() as folder:
        command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount + "true", "sh", folder]
        if not shutil.which("unshare") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this machine lets no process mount a small disk of its own")
        command[6:] = [mount + 'exec "$2" -c "$3"', "sh", folder, sys.executable, code]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=60).stdout


@contextmanager
def shared_folder():
    """A folder that another user may reach; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def run_python(code, *arguments, status=0, **options):
    """A Python process that runs `code` to its end: its stdout, or stderr where it must end with another `status`."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


def modules_after(code):
    """Names of all modules that are loaded in a new process once it has run `code`."""
    return set(run_python(f"{code}\nimport sys\nprint(*sys.modules)").split())


def start_python(code, *arguments, **options):
    """A Python process that runs `code`; it reports on stdout how far it is."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
