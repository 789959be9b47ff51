"""The cache of built artefacts: build once per machine, trust only what comes back whole.

    key    = sha256 of everything that the artefact depends on (skipstep.bundles.cache_key)
    entry  = MAGIC ‖ sha256(rest) ‖ rest,    rest = key ‖ lengths ‖ description ‖ artefact      in the file <key>.entry
    lock   = flock on <key>.lock; the kernel frees it when its holder dies, however it dies

An entry appears by one rename, holds its own key, and is hashed before any byte of it is used, so a half-written, a
damaged or a renamed entry is a miss and nothing worse. The hash guards against damage, not against other users; against
them, the folder and every entry must belong to this user and be closed to writing by others.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import stat
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from skipstep.errors import CacheError, InputError, StorageError
from skipstep.storage.atomic import atomic_write
from skipstep.storage.verified import read_up_to

DEFAULT_MAX_BYTES = 8 << 30

_MAGIC = b"skipstep cache1\n"
_HEAD = struct.Struct(f"<{len(_MAGIC)}s32s32sIQ")  # magic, digest of what follows it, key, two lengths
_HASHED_FROM = len(_MAGIC) + 32
_MAX_DESCRIPTION = 1000
_KEY = re.compile(r"[0-9a-f]{64}")
_ENTRY = re.compile(r"([0-9a-f]{64})\.entry")
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One artefact in the cache: `bytes` is its size on disk, `last_used` seconds since the epoch."""

    key: str
    description: str
    bytes: int
    last_used: float


def default_folder() -> Path:
    """$SKIPSTEP_CACHE, else $XDG_CACHE_HOME/skipstep (which has to be absolute), else ~/.cache/skipstep."""
    if own := os.environ.get("SKIPSTEP_CACHE"):
        return Path(os.path.expanduser(own)).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "skipstep"


class ArtefactCache:
    """Artefacts as bytes under their `cache_key`, for one user, bounded to `max_bytes` on disk.

    The least recently used entries make room for new ones; what a process has locked stays, even if the bound is then
    exceeded for a while. Threads and processes may share a folder. `get`, `put`, `entries` and `clear` raise
    CacheError or StorageError where the folder cannot be used; `get_or_build` warns once and works without it.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.folder = default_folder() if folder is None else Path(folder).absolute()
        self.max_bytes = max_bytes
        self._warned = False

    def get(self, key: str) -> bytes | None:
        """The artefact, verified, or None. An entry that is damaged or not this user's is removed."""
        _check_key(key)
        with self._open(create=False) as folder:
            if folder is None:
                return None
            name = f"{key}.entry"
            data = None
            try:
                fd = os.open(name, _READ, dir_fd=folder)
                try:
                    data = _read_entry(fd, key)
                    os.utime(fd)
                finally:
                    os.close(fd)
            except FileNotFoundError:
                return None
            except OSError:  # A link, an unreadable file, or a read-only folder, which keeps no record of use.
                pass
            if data is None:
                with suppress(OSError):
                    os.unlink(name, dir_fd=folder)
            return data

    def put(self, key: str, data: bytes, description: str) -> None:
        """Store an artefact, in place of an older one; `description` is one line for the listing of the cache."""
        _check_key(key)
        with self._locked(key):
            self._store(key, data, description)

    def get_or_build(self, key: str, build: Callable[[], bytes], description: str) -> bytes:
        """The artefact of the cache, else of `build()`, which is then stored.

        Of several processes that ask for one key at once, one builds and the others wait for it. What `build` raises
        passes through; it must not ask for its own key. With a cache that cannot be used
        it warns and returns the artefact without storing it; so it does, without a warning, with one whose weights are
        beside it (skipstep.networks.large_graph).
        """
        with ExitStack() as held:
            try:
                if (data := self.get(key)) is not None:
                    return data
                held.enter_context(self._locked(key))
                if (data := self.get(key)) is not None:  # Built while this process waited.
                    return data
            except (CacheError, StorageError) as error:
                self._warn(error)
            data = build()
            if type(data) is not bytes:  # A LargeGraph: the bytes are not all of it.
                return data
            try:
                self._store(key, data, description)
            except (CacheError, StorageError) as error:
                self._warn(error)
            return data

    def entries(self) -> list[CacheEntry]:
        """All entries, most recently used first. Sizes and descriptions are as recorded, not verified."""
        found = []
        with self._open(create=False) as folder, _cache_errors(self.folder):
            for key, status in _scan(folder):
                description = _read_description(folder, key)
                found.append(CacheEntry(key, description, status.st_size, status.st_mtime))
        return sorted(found, key=lambda entry: entry.last_used, reverse=True)

    def clear(self, key: str | None = None) -> int:
        """Remove one entry, or all; how many there were. Entries in use stay readable to those who have them open."""
        removed = 0
        if key is not None:
            _check_key(key)
        with self._open(create=False) as folder, _cache_errors(self.folder):
            for found, _ in list(_scan(folder)):
                if key in (None, found):
                    with suppress(FileNotFoundError):
                        os.unlink(f"{found}.entry", dir_fd=folder)
                        removed += 1
        return removed

    def _store(self, key: str, data: bytes, description: str) -> None:
        """Write an entry whose key this process has locked, after making room for it."""
        text = " ".join(description.split()).encode("utf-8", "replace")[:_MAX_DESCRIPTION]
        digest = hashlib.sha256()
        head = _HEAD.pack(_MAGIC, bytes(32), bytes.fromhex(key), len(text), len(data))
        for piece in (head[_HASHED_FROM:], text, data):
            digest.update(piece)
        head = _MAGIC + digest.digest() + head[_HASHED_FROM:]
        size = len(head) + len(text) + len(data)
        if size > self.max_bytes:
            raise CacheError(
                got=f"an artefact of {size} bytes for the cache {self.folder}",
                expected=f"at most {self.max_bytes} bytes, the bound of the whole cache",
                remedy="raise max_bytes",
            )
        with self._open(create=True) as folder:
            assert folder is not None
            with suppress(OSError):  # One writer at a time keeps the bound; where folders have no locks, nearly.
                fcntl.flock(folder, fcntl.LOCK_EX)
            self._make_room(folder, size, key)
            atomic_write(self.folder / f"{key}.entry", (head, text, data), mode=0o600)

    def _make_room(self, folder: int, size: int, key: str) -> None:
        """Remove the entries unused for longest until `size` more bytes fit; entry `key` is about to be replaced."""
        entries = sorted((e for e in _scan(folder) if e[0] != key), key=lambda entry: entry[1].st_mtime)
        excess = sum(status.st_size for _, status in entries) + size - self.max_bytes
        for other, status in entries:
            if excess <= 0:
                return
            with suppress(OSError), _lock(folder, other, wait=False):
                os.unlink(f"{other}.entry", dir_fd=folder)
                excess -= status.st_size

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Hold the lock of `key`, and wait for it as long as its holder lives."""
        with self._open(create=True) as folder, ExitStack() as stack:
            assert folder is not None
            with _cache_errors(self.folder):
                stack.enter_context(_lock(folder, key, wait=True))
            yield

    @contextmanager
    def _open(self, *, create: bool) -> Iterator[int | None]:
        """A descriptor of the folder, the user's own and closed to others; None where the folder is missing."""
        fd = None
        with _cache_errors(self.folder):
            try:
                if not self.folder.is_absolute():
                    raise OSError("no home folder")
                if create:
                    self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                if create:
                    raise
        try:
            if fd is not None:
                with _cache_errors(self.folder):
                    self._make_private(fd)
            yield fd
        finally:
            if fd is not None:
                os.close(fd)

    def _make_private(self, folder: int) -> None:
        status = os.fstat(folder)
        if status.st_uid != os.geteuid():
            raise CacheError(
                got=f"the cache folder {self.folder} of user {status.st_uid}",
                expected=f"a folder of this user, {os.geteuid()}",
                remedy="set SKIPSTEP_CACHE to a folder of your own",
            )
        # Others may have written while the folder was open to them: every entry is checked for itself as well.
        if stat.S_IMODE(status.st_mode) & 0o077:
            try:
                os.fchmod(folder, 0o700)
            except OSError:  # A read-only disk may show the entries to others, but not take theirs.
                if status.st_mode & 0o022:
                    raise

    def _warn(self, error: CacheError | StorageError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"the artefact is built but not kept: {error}", RuntimeWarning, stacklevel=3)


def _check_key(key: str) -> None:
    if not _KEY.fullmatch(key):
        raise InputError(
            got=f"the cache key {key!r}", expected="64 hexadecimal digits", remedy="use skipstep.bundles.cache_key"
        )


@contextmanager
def _lock(folder: int, key: str, *, wait: bool) -> Iterator[None]:
    """Hold the lock of `key`; without `wait` a lock that is held elsewhere raises BlockingIOError."""
    name = f"{key}.lock"
    fd = _open_locked(folder, name, wait)
    # The previous holder may have removed the file while we waited; then others would lock another file.
    while not _is_named(fd, folder, name):
        os.close(fd)
        fd = _open_locked(folder, name, wait)
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(name, dir_fd=folder)
        os.close(fd)


def _open_locked(folder: int, name: str, wait: bool) -> int:
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _is_named(fd: int, folder: int, name: str) -> bool:
    try:
        return os.path.samestat(os.stat(name, dir_fd=folder, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def _read_entry(fd: int, key: str) -> bytes | None:
    """The artefact of an open entry, or None if it is not what this user once stored under `key`."""
    status = os.fstat(fd)
    if not _is_private(status) or len(head := read_up_to(fd, _HEAD.size)) != _HEAD.size:
        return None
    magic, digest, key_bytes, text_size, data_size = _HEAD.unpack(head)
    expected_size = _HEAD.size + text_size + data_size
    if magic != _MAGIC or key_bytes.hex() != key or status.st_size != expected_size:
        return None
    text, data = read_up_to(fd, text_size), read_up_to(fd, data_size)
    found = hashlib.sha256()
    for piece in (head[_HASHED_FROM:], text, data):
        found.update(piece)
    return data if found.digest() == digest else None


def _is_private(status: os.stat_result) -> bool:
    """A regular file of this user under one name only, which no other user may write."""
    return (
        stat.S_ISREG(status.st_mode)
        and status.st_nlink == 1
        and status.st_uid == os.geteuid()
        and not stat.S_IMODE(status.st_mode) & 0o022
    )


def _read_description(folder: int | None, key: str) -> str:
    with suppress(OSError, struct.error):
        fd = os.open(f"{key}.entry", _READ, dir_fd=folder)
        try:
            text_size = _HEAD.unpack(os.read(fd, _HEAD.size))[3]
            text = os.read(fd, min(text_size, _MAX_DESCRIPTION)).decode("utf-8", "replace")
            return "".join(c if c.isprintable() else "?" for c in text)
        finally:
            os.close(fd)
    return "damaged"


def _scan(folder: int | None) -> Iterator[tuple[str, os.stat_result]]:
    """Keys and file status of the entries in a folder."""
    if folder is None:
        return
    with os.scandir(folder) as found:
        for file in found:
            if match := _ENTRY.fullmatch(file.name):
                with suppress(FileNotFoundError):
                    yield match[1], file.stat(follow_symlinks=False)


@contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except CacheError:
        raise
    except OSError as error:
        link = error.errno in (errno.ELOOP, errno.ENOTDIR) and folder.is_symlink()
        reason = "a symbolic link" if link else repr(error.strerror or str(error))
        raise CacheError(
            got=f"{reason} for the cache folder {folder}",
            expected="a folder that this user may write to",
            remedy="set SKIPSTEP_CACHE to a folder of your own on a writable disk",
        ) from error
