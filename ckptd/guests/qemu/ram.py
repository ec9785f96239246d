"""A guest's RAM in QEMU, as regions: mapped where QEMU shares it, and read out of its process where it is private.

Reading a private page is process_vm_readv(2): one call for up to 1,024 runs of pages. It needs what ptrace needs.
"""

from __future__ import annotations

import ctypes
import os
from mmap import MAP_SHARED, PROT_READ, mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptd.errors import GuestError
from ckptd.guests.qemu.survey import Backend, Survey
from ckptd.memory.dirtyset import Gfns, runs_of
from ckptd.memory.regions import Geometry, Region
from ckptd.units import PAGE_SIZE

__all__ = ["PrivateRam", "backends_of", "geometry_of", "map_backing", "open_backing"]

_MOST_RUNS = 1024  # IOV_MAX

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = [
    ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong,
]  # fmt: skip


def backends_of(survey: Survey) -> list[Backend]:
    """The RAM that the guest uses, in QEMU's order: one region each."""
    return [one for one in survey.ram if one.used]


def geometry_of(survey: Survey) -> Geometry:
    """The regions, by the names of their backends."""
    return Geometry(tuple(Region(one.id, one.size // PAGE_SIZE) for one in backends_of(survey)))


def open_backing(pid: int, backend: Backend) -> int:
    """A descriptor of the file or memfd behind a shared backend; -1 for a private one. Raises GuestError."""
    if not backend.share or not backend.file_inode:
        return -1
    for number in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{number}"
        try:
            found = os.stat(path)
            if found.st_ino == backend.file_inode and _device(found.st_dev) == backend.file_device:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue  # it was closed meanwhile, or is no file
    raise GuestError(
        "the file behind this RAM cannot be opened", region=backend.id, pid=pid,
        hint="ckptd needs the rights of that process: run it as root, or as the same user with CAP_SYS_PTRACE",
    )  # fmt: skip


def _device(number: int) -> str:
    """As /proc/PID/maps writes it."""
    return f"{os.major(number):02x}:{os.minor(number):02x}"


def map_backing(fd: int, backend: Backend) -> npt.NDArray[np.uint8]:
    """The region, shared and read-only, (pages, 4096)."""
    mapping = mmap(fd, backend.size, flags=MAP_SHARED, prot=PROT_READ, offset=backend.file_offset)
    return np.frombuffer(mapping, dtype=np.uint8).reshape(-1, PAGE_SIZE)


class PrivateRam:
    """A region that only QEMU maps: looks like an array (pages, 4096), of which a slice is a copy, made now."""

    def __init__(self, pid: int, address: int, pages: int, name: str) -> None:
        self.shape = (pages, PAGE_SIZE)
        self._pid, self._address, self._name = pid, address, name

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: slice) -> npt.NDArray[np.uint8]:
        start, stop, step = which.indices(len(self))
        assert step == 1
        rows = np.empty((max(0, stop - start), PAGE_SIZE), dtype=np.uint8)
        if len(rows):
            self._read(np.array([start], dtype=np.int64), np.array([len(rows)], dtype=np.int64), rows)
        return rows

    def read_pages(self, gfns: Gfns, out: npt.NDArray[np.uint8]) -> None:
        """Gather pages into `out`, shape (len(gfns), 4096), contiguous. Raises GuestError."""
        starts, lengths = runs_of(gfns)
        at = 0
        for begin in range(0, len(starts), _MOST_RUNS):
            piece = slice(begin, begin + _MOST_RUNS)
            pages = int(lengths[piece].sum())
            self._read(starts[piece], lengths[piece], out[at : at + pages])
            at += pages

    def _read(self, starts: Gfns, lengths: Gfns, out: npt.NDArray[np.uint8]) -> None:
        # struct iovec { void *iov_base; size_t iov_len; }: 16 bytes
        remote = np.empty((len(starts), 2), dtype=np.uint64)
        remote[:, 0] = self._address + starts * PAGE_SIZE
        remote[:, 1] = lengths * PAGE_SIZE
        local: npt.NDArray[Any] = np.array([[out.ctypes.data, out.nbytes]], dtype=np.uint64)
        done = _libc.process_vm_readv(self._pid, local.ctypes.data, 1, remote.ctypes.data, len(remote), 0)
        if done != out.nbytes:
            why = os.strerror(ctypes.get_errno()) if done < 0 else f"{done} of {out.nbytes} bytes"
            raise GuestError(
                f"QEMU's memory cannot be read: {why}", region=self._name, gfn=int(starts[0]), pid=self._pid,
                hint="ckptd needs CAP_SYS_PTRACE, or to be root",
            )  # fmt: skip
