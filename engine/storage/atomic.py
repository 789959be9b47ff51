"""Files that are whole or absent: writes that appear at once, and reads that return only the promised bytes.

    write   temporary sibling -> fsync -> one rename -> fsync of the folder above
    read    open below a root without following a link -> size -> read once -> sha256 of those very bytes

A writer holds a lock on its temporary sibling. The kernel drops the lock with the process, so the next writer in the
same folder tells a killed writer's left-over (free) from the work of a living one (locked) and removes it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from skipstep.errors import IntegrityError, SkipstepError, StorageError

_PARTIAL = re.compile(r"\.skipstep-[0-9a-f]{16}\.partial")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)
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


def atomic_write(path: str | os.PathLike[str], data: bytes | Iterable[bytes], *, mode: int = 0o644) -> None:
    """Write `data`, whole or in pieces, to the file `path`: readers see the old content or the new, never a part.

    `mode` is narrowed by the umask. A symbolic link at `path` is replaced, not followed. The folder must exist.
    Raises StorageError; whatever is raised, the old file is as it was and no temporary file is left.
    """
    path = Path(path)
    with _folder_of(path) as folder:
        with _storage_errors(path):
            _refuse_other_kinds(path, (stat.S_IFREG, stat.S_IFLNK), "a regular file or a free name")
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            name, fd = _claim(folder, lambda name: os.open(name, flags, mode, dir_fd=folder))
        try:
            for piece in (data,) if isinstance(data, bytes) else data:
                with _storage_errors(path):
                    _write(fd, piece)
            with _storage_errors(path):
                os.fsync(fd)
                os.replace(name, path.name, src_dir_fd=folder, dst_dir_fd=folder)
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

    An existing folder `path` is refused, or with `replace` swapped for the new one in one step where the file system
    can (two renames where it cannot) and then removed. Two writers of one path do not mix: the last one stays.
    Raises StorageError, also for a full disk inside the block; other exceptions of the block pass through.
    """
    path = Path(path).absolute()
    with _folder_of(path) as folder:
        with _storage_errors(path):
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
            with _storage_errors(path):
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


def check_relative_name(name: object) -> str:
    """`name` if it is a plain relative file name ("a/b.onnx"); anything that could lead elsewhere: IntegrityError."""
    if not isinstance(name, str):
        problem = f"a {type(name).__name__}"
    elif not name.isascii() and not _encodes(name):
        problem = "characters that no file name can hold"
    elif "\0" in name or "\\" in name:
        problem = "a NUL or a backslash"
    elif any(part in ("", ".", "..") for part in name.split("/")):
        problem = "an absolute path, or an empty, '.' or '..' component"
    elif re.search(r"(^|/)[A-Za-z]:", name):
        problem = "a drive letter"
    else:
        return name
    raise IntegrityError(
        got=f"{problem} as the file name {name!r:.200}",
        expected="a name relative to its folder, with '/' between components",
        remedy="take the files from a source that you trust; this one may try to reach outside its folder",
    )


def read_verified(
    root: str | os.PathLike[str], name: str, *, size: int, sha256: str, allow_hard_links: bool = False
) -> bytes:
    """The bytes of file `name` below the folder `root`, if there are `size` of them and they hash to `sha256` (hex).

    No component below `root` may be a symbolic link, and the file must be a regular one. It is opened once and read
    once, and what was hashed is what is returned, so nothing can change in between. A second hard link is refused too:
    it would let a bundle adopt a file from elsewhere. `allow_hard_links` is for folders that a package manager fills
    by linking from its store. Raises IntegrityError.
    """
    path = f"{os.fspath(root)}/{check_relative_name(name)}"
    fd = _open_below(root, name, path)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _integrity_error(path, _kind(status.st_mode), "a regular file")
        if status.st_nlink > 1 and not allow_hard_links:
            raise IntegrityError(
                got=f"{path} with {status.st_nlink} hard links", expected="one", remedy="copy the folder with `cp -r`"
            )
        if status.st_size != size:
            raise _integrity_error(path, f"{status.st_size} bytes", f"{size} bytes")
        data = read_up_to(fd, size + 1)
    except OSError as error:
        raise _integrity_error(path, error.strerror or str(error), "a readable file") from error
    finally:
        os.close(fd)
    if len(data) != size:
        raise _integrity_error(path, f"{len(data)} bytes or more", f"{size} bytes")
    if (digest := hashlib.sha256(data).hexdigest()) != sha256:
        raise _integrity_error(path, f"sha256 {digest}", f"sha256 {sha256}")
    return data


def read_up_to(fd: int, size: int) -> bytes:
    """The next `size` bytes of an open file, or fewer where it ends."""
    pieces = []
    while size and (piece := os.read(fd, size)):
        pieces.append(piece)
        size -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_below(root: str | os.PathLike[str], name: str, path: str) -> int:
    """Open `name` component by component, each relative to the one before, so no link can be slipped in between."""
    here = None
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        here = os.open(root, flags | os.O_DIRECTORY)
        *folders, last = name.split("/")
        for folder in folders:
            above, here = here, os.open(folder, flags | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
            os.close(above)
        # Without O_NONBLOCK the opening of a named pipe would wait for a writer.
        return os.open(last, flags | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=here)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            got = "a symbolic link, or a component that is not a folder"
        elif error.errno == errno.ENOENT:
            got = "no such file"
        else:
            got = error.strerror or str(error)
        raise _integrity_error(path, got, "a readable regular file") from error
    finally:
        if here is not None:
            os.close(here)


def _integrity_error(path: str, got: str, expected: str) -> IntegrityError:
    remedy = "complete or repeat the download or copy; if it is complete, do not trust it and build it again"
    return IntegrityError(got=f"{path!r}: {got}", expected=expected, remedy=remedy)


def _encodes(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(mode: int) -> str:
    """The kind of a file in words."""
    kinds = {stat.S_IFREG: "a regular file", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a symbolic link"}
    return kinds.get(stat.S_IFMT(mode), "a device, pipe or socket")


def _claim(folder: int, make: Callable[[str], int]) -> tuple[str, int]:
    """A new temporary name in `folder` and the open, locked descriptor of what `make(name)` put there."""
    _sweep(folder)
    for _ in range(16):
        name = f".skipstep-{os.urandom(8).hex()}.partial"
        # Another writer's sweep may take it for a left-over before it is locked; then it is gone, and we try again.
        with suppress(FileNotFoundError):
            fd = make(name)
            try:
                with suppress(OSError):  # Network file systems may lack locks; then nobody can sweep either.
                    fcntl.flock(fd, fcntl.LOCK_EX)
                if os.path.samestat(os.stat(name, dir_fd=folder, follow_symlinks=False), os.fstat(fd)):
                    return name, fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
    raise FileNotFoundError(errno.ENOENT, "the folder was removed")


def _sweep(folder: int) -> None:
    """Remove the left-overs of killed writers: temporary names that no process holds a lock on."""
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
    with _storage_errors(path):
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno != errno.EINVAL:  # The file system has no such thing.
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
    """Swap two names in one step (Linux renameat2); False where the C library or the file system cannot."""
    import ctypes

    at_fdcwd, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code))


@contextmanager
def _folder_of(path: Path) -> Iterator[int]:
    """A descriptor of the folder that holds `path`: names in it keep their meaning even if the folder is renamed."""
    with _storage_errors(path):
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
            got=f"{path}, which is {_kind(mode)}", expected=expected, remedy="choose another name, or remove it first"
        )


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
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
