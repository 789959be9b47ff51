"""Reads that return only the promised bytes.

open below a root without following a link -> check the size -> read once -> sha256 of those very bytes
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat

from skipstep.errors import IntegrityError


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
            raise _integrity_error(path, kind_of_file(status.st_mode), "a regular file")
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


def read_below(root: str | os.PathLike[str], name: str, *, limit: int) -> bytes:
    """The first `limit` bytes of the regular file `name` below the folder `root`, which no link leads to.

    Raises IntegrityError.
    """
    path = f"{os.fspath(root)}/{check_relative_name(name)}"
    fd = _open_below(root, name, path)
    try:
        if not stat.S_ISREG(mode := os.fstat(fd).st_mode):
            raise _integrity_error(path, kind_of_file(mode), "a regular file")
        return read_up_to(fd, limit)
    except OSError as error:
        raise _integrity_error(path, error.strerror or str(error), "a readable file") from error
    finally:
        os.close(fd)


def read_regular(path: str | os.PathLike[str], limit: int, *, follow: bool = False) -> bytes:
    """The first `limit` bytes of a regular file, through a link only with `follow`. Raises OSError for all else."""
    # Without O_NONBLOCK the opening of a named pipe would wait for a writer.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "no regular file")
        return read_up_to(fd, limit)
    finally:
        os.close(fd)


def read_up_to(fd: int, size: int) -> bytes:
    """The next `size` bytes of an open file, or fewer where it ends."""
    pieces = []
    while size and (piece := os.read(fd, size)):
        pieces.append(piece)
        size -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


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


def kind_of_file(mode: int) -> str:
    """The kind of a file in words."""
    kinds = {stat.S_IFREG: "a regular file", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a symbolic link"}
    return kinds.get(stat.S_IFMT(mode), "a device, pipe or socket")
