"""The file calls of a replica: clean errors instead of SIGBUS, a lock, directory entries that last.

Every byte that is later written through a mapping is allocated here first, because a store into a mapping whose file
system is full kills the process. Knows nothing of what the files hold.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from ckptd.errors import NoSpace, ReplicaError, StateError
from ckptd.memory.regions import Geometry
from ckptd.units import format_size

__all__ = [
    "Lock", "allocate", "boot_id", "image_names", "map_file", "populate", "saying", "sync_directory", "sync_file",
]  # fmt: skip

_POPULATE_READ, _POPULATE_WRITE = 22, 23  # which the mmap module does not name
_POPULATE_STEP = 16 << 20  # bytes; the call keeps the GIL
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def saying(what: str, path: Path) -> Iterator[None]:
    """OSError becomes NoSpace or ReplicaError naming what was tried and the file."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            hint = "free some space, or lower replica.history_bytes"
            raise NoSpace(f"cannot {what}: {error.strerror}", hint=hint, file=path) from error
        raise ReplicaError(f"cannot {what}: {error.strerror}", file=path) from error


def allocate(fd: int, start: int, length: int, path: Path) -> None:
    """Make sure that writing these bytes cannot fail for lack of space. Raises NoSpace; the file is then as it was."""
    before = os.fstat(fd).st_size
    try:
        with saying(f"allocate {format_size(length)}", path):
            os.posix_fallocate(fd, start, length)
    except ReplicaError:
        os.ftruncate(fd, before)  # what was allocated before the end of space was reached
        raise


def map_file(fd: int, length: int) -> mmap.mmap:
    """A shared, writable mapping of the first `length` bytes."""
    return mmap.mmap(fd, length, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def populate(mapped: mmap.mmap, start: int, length: int, *, write: bool = True) -> None:
    """Make these pages present, many at a time: one by one, as faults, they cost several times as much.

    `write` also makes them dirty, for what is about to be written. Source: madvise(2), MADV_POPULATE_READ and _WRITE.
    """
    advice = _POPULATE_WRITE if write else _POPULATE_READ
    with suppress(OSError):  # only a kernel before 5.14 says no; the pages then come as faults
        for at in range(start, start + length, _POPULATE_STEP):
            mapped.madvise(advice, at, min(_POPULATE_STEP, start + length - at))


def sync_file(fd: int, path: Path) -> None:
    """fdatasync. After an error the file is suspect, cached pages too: never retry, never acknowledge what is in it."""
    with saying("write to stable storage", path):
        os.fdatasync(fd)


def sync_directory(directory: Path) -> None:
    """Make names that were created, renamed or removed last through a power loss."""
    with saying("write the directory to stable storage", directory):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def boot_id() -> str:
    """Names this boot of the kernel: what was only in memory in another boot is gone. Source: random(4)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def image_names(geometry: Geometry) -> list[str]:
    """One file name for each region, `image-<region>`; odd characters are quoted, overlong names numbered."""
    names = [f"image-{quote(region.name, safe='')}" for region in geometry]
    return [name if len(name) <= 200 else f"image-{index}%" for index, name in enumerate(names)]


class Lock:
    """An exclusive flock for as long as it is open. Raises StateError where somebody else holds it."""

    def __init__(self, path: Path) -> None:
        with saying("open the lock", path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise StateError(
                "another process has this replica open", hint="ask that daemon, or end it first", directory=path.parent
            ) from None

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
