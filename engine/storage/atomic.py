"""Files and folders that are whole or absent: a write appears under its name all at once.

    temporary name beside the target -> fsync -> one rename -> fsync of the folder above

A writer holds a lock on its temporary name. The kernel releases the lock when the process ends, so the next writer in
the same folder can tell what a killed writer left (unlocked) from the work of a running one (locked), and removes it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from skipstep.errors import SkipstepError, StorageError
from skipstep.storage.verified import kind_of_file

_PARTIAL = re.compile(r"\.skipstep-[0-9a-f]{16}\.partial")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)
_AT_FDCWD, _RENAME_NOREPLACE, _RENAME_EXCHANGE = -100, 1, 2
_REMEDIES = {
    errno.ENOSPC: "free space on this disk, or write to another one",
    errno.EDQUOT: "free some of this user's quota, or write to another disk",
    errno.EFBIG: "raise the file size limit (ulimit -f), or write to a file system that allows larger files",
    errno.EROFS: "choose a folder on a writable file system",
    errno.EACCES: "choose a folder that this user may write to",
    errno.EPERM: "choose a folder that this user may write to",
    errno.ENOTEMPTY: "choose another name, or allow the folder to be replaced",
    errno.EEXIST: "choose another name, or allow the folder to be replaced",
    errno.ENOENT: "create the folder first",
    errno.ENOTDIR: "choose a path whose parents are folders",
}


def atomic_write(
    path: str | os.PathLike[str], data: bytes | Iterable[bytes], *, mode: int = 0o644, replace: bool = True
) -> None:
    """Write `data`, whole or in pieces, to the file `path`: readers see the old content or the new, never a part.

    `mode` is narrowed by the umask. A symbolic link at `path` is replaced, not followed. The folder must exist.
    Without `replace` an existing name, of whatever kind, is refused: the StorageError's cause is a FileExistsError.
    Raises StorageError; whatever is raised, the old file is as it was and no temporary file is left.
    """
    path = Path(path)
    with _folder_of(path) as folder:
        with storage_errors(path):
            if replace:
                _refuse_other_kinds(path, (stat.S_IFREG, stat.S_IFLNK), "a regular file or a free name")
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            name, fd = _claim(folder, lambda name: os.open(name, flags, mode, dir_fd=folder))
        try:
            for piece in (data,) if isinstance(data, bytes) else data:
                with storage_errors(path):
                    _write(fd, piece)
            with storage_errors(path):
                os.fsync(fd)
                if replace:
                    os.replace(name, path.name, src_dir_fd=folder, dst_dir_fd=folder)
                elif not _renameat2(path.parent / name, path, _RENAME_NOREPLACE):
                    os.link(name, path.name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
                    os.unlink(name, dir_fd=folder)
        except BaseException:
            with suppress(OSError):
                os.unlink(name, dir_fd=folder)
            raise
        finally:
            os.close(fd)
        _sync_names(folder, path)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, replace: bool) -> Iterator[Path]:
    """A new folder to fill; it takes the name `path` when the block ends well and vanishes when it does not.

    An existing folder `path` is refused, or, with `replace`, swapped for the new one in one step where the file system
    can (two renames where it cannot) and then removed. Two writers of one path do not mix: the last one stays.
    Raises StorageError, also for a full disk inside the block; other exceptions of the block pass through.
    """
    path = Path(path).absolute()
    with _folder_of(path) as folder:
        with storage_errors(path):
            _restore_previous(path)
            _refuse_other_kinds(path, (stat.S_IFDIR,) if replace else (), "a folder" if replace else "a free name")
            name, fd = _claim(folder, lambda name: _make_folder(name, folder))
        new = path.parent / name
        try:
            try:
                yield new
            except OSError as error:
                if error.errno in _FULL:
                    raise _storage_error(path, error) from error
                raise
            with storage_errors(path):
                _sync_tree(new)
                try:
                    os.rename(new, path)
                except OSError as error:
                    if not replace or error.errno not in _OCCUPIED:
                        raise
                    _swap_folders(new, path)
        finally:
            # After a swap this name holds what was replaced; after a plain rename there is nothing under it.
            _remove(new)
            os.close(fd)
        _sync_names(folder, path)


def check_writable(folder: str | os.PathLike[str], *, may_be_missing: bool = True) -> None:
    """Raise StorageError where no file could be put into `folder`; before long work, whose result would be lost.

    For one that is missing the nearest folder above it counts.
    """
    import tempfile  # Only writers need it, and it is slow to import.

    path = Path(folder).absolute()
    with storage_errors(path):
        while may_be_missing and not os.path.lexists(path):
            path = path.parent
        with tempfile.TemporaryFile(dir=path):
            pass


def _claim(folder: int, make: Callable[[str], int]) -> tuple[str, int]:
    """A new temporary name in `folder` and the open, locked descriptor of what `make(name)` put there."""
    _sweep(folder)
    for _ in range(16):
        name = f".skipstep-{os.urandom(8).hex()}.partial"
        # Before it is locked another writer's sweep may remove it as abandoned; then we try another name.
        with suppress(FileNotFoundError):
            fd = make(name)
            try:
                with suppress(OSError):  # Network file systems may lack locks; then no sweep removes anything.
                    fcntl.flock(fd, fcntl.LOCK_EX)
                if os.path.samestat(os.stat(name, dir_fd=folder, follow_symlinks=False), os.fstat(fd)):
                    return name, fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
    raise FileNotFoundError(errno.ENOENT, "the folder was removed")


def _sweep(folder: int) -> None:
    """Remove what killed writers left: temporary names that no process holds a lock on."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if _PARTIAL.fullmatch(entry.name)]
    for name in names:
        with suppress(OSError):
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if stat.S_ISDIR(os.fstat(fd).st_mode):
                    _remove(name, folder)
                else:
                    os.unlink(name, dir_fd=folder)
            finally:
                os.close(fd)


def _make_folder(name: str, parent: int) -> int:
    os.mkdir(name, dir_fd=parent)
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)


def _remove(path: str | os.PathLike[str], folder: int | None = None) -> None:
    import shutil  # Only writers need it, and it is slow to import.

    shutil.rmtree(path, ignore_errors=True, dir_fd=folder)


def _write(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _sync_tree(folder: Path) -> None:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            _sync_tree(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            _sync(entry.path)
    _sync(folder)


def _sync(path: str | os.PathLike[str]) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_names(folder: int, path: Path) -> None:
    """Make the rename itself survive a power cut."""
    with storage_errors(path):
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno != errno.EINVAL:  # The file system does not support it.
                raise


def _swap_folders(new: Path, path: Path) -> None:
    """Give `path` the folder `new`, and `new` the old one."""
    if _exchange(new, path):
        return
    previous = _previous(path)
    _remove(previous)
    os.rename(path, previous)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(previous, path)
        raise
    _remove(previous)


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def _restore_previous(path: Path) -> None:
    """Undo the first of two renames whose writer was killed before the second."""
    if not os.path.lexists(path) and (previous := _previous(path)).is_dir():
        os.rename(previous, path)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where that is not supported."""
    return _renameat2(a, b, _RENAME_EXCHANGE)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Linux' rename with flags; False where the C library or the file system does not support it."""
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code))


@contextmanager
def _folder_of(path: Path) -> Iterator[int]:
    """A descriptor of the folder that holds `path`: names in it keep their meaning even if the folder is renamed."""
    with storage_errors(path):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield folder
    finally:
        os.close(folder)


def _refuse_other_kinds(path: Path, allowed: tuple[int, ...], expected: str) -> None:
    """Renaming over a device would replace the device, and over a link to a folder would lose the link."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_IFMT(mode) not in allowed:
        raise StorageError(
            got=f"{path}, which is {kind_of_file(mode)}",
            expected=expected,
            remedy="choose another name, or remove it first",
        )


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the system says of a write to `path` into a StorageError with a remedy."""
    try:
        yield
    except OSError as error:
        if isinstance(error, SkipstepError):
            raise
        raise _storage_error(path, error) from error


def _storage_error(path: Path, error: OSError) -> StorageError:
    reason = error.strerror or str(error)
    remedy = _REMEDIES.get(error.errno or 0, "check the path and the health of the disk")
    return StorageError(got=f"{reason!r} while writing {path}", expected="a complete write", remedy=remedy)
