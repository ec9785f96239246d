"""The dirty pages of any process by soft-dirty bits, for kernels without asynchronous write protection.

Writing 4 to /proc/PID/clear_refs protects every page of the process; the first write to a page sets bit 55 of its entry
in /proc/PID/pagemap. Reading the entries and clearing the bits are two steps, and a write between them is lost: so
`needs_pause`. Clearing walks all memory of the process, whatever the guest's share of it.

    an entry of pagemap, u64
    bit 55 soft-dirty | bit 62 swapped | bit 63 present | the rest is not looked at

Not exact: a mapping that is new, or was merged with one, is reported whole; so is a transparent huge page. A page that
was there and is no longer (MADV_DONTNEED, which leaves zeros; or shared memory that was reclaimed) has lost its bit and
counts as written. Lost is a page of *shared* memory that between two harvests was touched for the first time, written
and reclaimed: do without swap. What trackers/pagemap.py does not see is not seen here either; but clear_refs leaves
private pages alone that are pinned for direct reads, so those are reported until they are let go.

Sources: Documentation/admin-guide/mm/soft-dirty.rst and pagemap.rst; fs/proc/task_mmu.c.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from ckptd.errors import TrackerError, TrackerUnavailable
from ckptd.memory.dirtyset import DirtySet, Gfns
from ckptd.memory.regions import Geometry
from ckptd.trackers.mappings import ProcessMemory
from ckptd.units import PAGE_SIZE

__all__ = ["SoftDirtyTracker", "self_test", "written"]

_ENTRIES = 1 << 18  # read at a time: 2 MiB of entries, 1 GiB of memory
_ENTRY_BYTES = 8
_SOFT_DIRTY = np.uint64(1 << 55)
_POPULATED = np.uint64(3 << 62)
_CLEAR_SOFT_DIRTY = b"4"

_CURE = "use a kernel with CONFIG_MEM_SOFT_DIRTY, or better Linux 6.7 or newer, where pagemap needs none of this"
_SECONDS = 20

# In a process of its own: clearing would cost ours, which maps the guest's memory, a fault for every page.
_PROGRAM = """
import ctypes, mmap
memory = mmap.mmap(-1, 4 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
try:
    memory.madvise(mmap.MADV_NOHUGEPAGE)
except OSError:
    pass
memory[:] = bytes(len(memory))
with open("/proc/self/clear_refs", "wb", buffering=0) as clear:
    clear.write(b"4")
memory[4096] = 1
with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
    pagemap.seek(ctypes.addressof(ctypes.c_char.from_buffer(memory)) // 4096 * 8)
    entries = memoryview(pagemap.read(32)).cast("Q")
print(*(entry >> 55 & 1 for entry in entries))
"""

Entries = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]


class SoftDirtyTracker:
    """`addresses`: where each region of the geometry begins in the memory of process `pid`."""

    __slots__ = ("_clear", "_entries", "_geometry", "_lost", "_memory", "_pagemap", "_populated", "_restored")

    name = "soft-dirty"
    exact = False
    needs_pause = True

    def __init__(self, geometry: Geometry, pid: int, addresses: Sequence[int]) -> None:
        self._geometry = geometry
        self._memory = ProcessMemory(geometry, pid, addresses)
        self._clear = self._pagemap = -1
        self._lost = False
        self._restored: DirtySet | None = None
        self._entries: Entries = np.zeros(_ENTRIES, dtype=np.uint64)
        self._populated: list[Flags] = [np.zeros(region.pages, dtype=np.bool_) for region in geometry]

    def start(self) -> None:
        """Try whether this kernel has it at all; then clear. Raises TrackerUnavailable, TrackerError."""
        if (why := self_test()) is not None:
            raise TrackerUnavailable(why, hint=_CURE)
        self.stop()
        try:
            self._memory.open()
            self._pagemap = self._open("pagemap", os.O_RDONLY)
            self._clear = self._open("clear_refs", os.O_WRONLY)
            self._take()
        except BaseException:
            self.stop()
            raise

    def harvest(self) -> DirtySet:
        if self._clear < 0:
            raise TrackerError("soft-dirty is not started", hint="start it and send everything again")
        lost = self._lost
        dirty = self._take()
        if lost:  # an earlier harvest failed after it had cleared
            dirty = DirtySet.empty(len(self._geometry), overflowed=True)
        if self._restored is not None:
            dirty, self._restored = dirty.merge(self._restored), None
        return dirty

    def restore(self, dirty: DirtySet) -> None:
        self._restored = dirty if self._restored is None else self._restored.merge(dirty)

    def stop(self) -> None:
        for fd in (self._clear, self._pagemap):
            if fd >= 0:
                os.close(fd)
        self._clear = self._pagemap = -1
        self._memory.close()
        self._restored = None
        self._lost = False

    def _take(self) -> DirtySet:
        self._lost = True
        gfns = [self._read(index) for index in range(len(self._geometry))]
        try:
            os.write(self._clear, _CLEAR_SOFT_DIRTY)
        except OSError as error:
            if error.errno == errno.ESRCH:
                raise self._memory.gone() from error
            raise TrackerError(f"clear_refs of process {self._memory.pid}: {error.strerror}") from error
        self._memory.check()
        self._lost = False
        return DirtySet(gfns)

    def _read(self, index: int) -> Gfns:
        """The written pages of a region."""
        start, end = self._memory.ranges[index]
        parts: list[Gfns] = []
        for first in range(start // PAGE_SIZE, end // PAGE_SIZE, _ENTRIES):
            entries = self._entries[: min(_ENTRIES, end // PAGE_SIZE - first)]
            done = 0
            while done < entries.nbytes:
                at = first * _ENTRY_BYTES + done
                count = os.preadv(self._pagemap, [entries.view(np.uint8).data[done:]], at)
                if not count:  # as for a process that has ended
                    raise self._memory.gone()
                done += count
            offset = first - start // PAGE_SIZE
            parts.append(written(entries, self._populated[index][offset : offset + len(entries)]) + offset)
        return np.concatenate(parts)

    def _open(self, name: str, flags: int) -> int:
        path = f"/proc/{self._memory.pid}/{name}"
        try:
            return os.open(path, flags | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise TrackerUnavailable(f"{path} is not there", hint=_CURE) from error
        except OSError as error:
            raise TrackerUnavailable(
                f"{path}: {error.strerror}", hint="run as root, or as the user of that process with CAP_SYS_PTRACE"
            ) from error


def written(entries: Entries, populated: Flags) -> Gfns:
    """The pages that were written or are gone, of these entries; `populated` is as it was and becomes as it is."""
    now = (entries & _POPULATED) != 0
    found: Gfns = np.flatnonzero(((entries & _SOFT_DIRTY) != 0) | (populated & ~now))
    populated[:] = now
    return found


@cache
def self_test() -> str | None:
    """None where this kernel reports a page that was written; else what it did instead, in words.

    There are kernels that take the order and report nothing.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"soft-dirty could not be tried: {error}"
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"it ended with {done.returncode}"]
        return f"soft-dirty could not be tried: {last[0]}"
    bits = done.stdout.split()
    if bits[1:2] != ["1"]:
        return "soft-dirty does not work on this kernel: a page was written, and it reports 0 pages"
    return None
