"""The dirty pages of any process, from outside: asynchronous write protection, taken by PAGEMAP_SCAN.

One userfaultfd is made inside the process when the tracker starts (trackers/injection.py); everything else happens
here. A harvest is one ioctl for each region: it names the written pages and protects them again, each in one step under
the page table's lock, so it may run beside the guest. It walks the page tables, so its cost follows the size of memory
first (0.2 ms for 512 MiB in 4 KiB pages) and the dirty pages second. Nothing is ever full.

What it sees: every write through the process's own page tables, by its threads (vCPUs of KVM and TCG, device models)
and by the kernel on its behalf (read(2) into guest memory, vhost without zero copy).

What it does not see, so a guest that has such a writer must not be protected by it:

- another process's mapping of the same file or memfd; write(2), fallocate(2) and hole punching of the file itself;
- MADV_REMOVE, and MADV_DONTNEED of a *private file* mapping (balloon, free page reporting, virtio-mem);
- devices that write past the page tables: VFIO, vhost-user in another process, RDMA;
- the rest of a direct read (O_DIRECT, io_uring's fixed buffers) that was in flight during a harvest: its pages count as
written when it begins. Harvest with such reads drained, as they are while QEMU is stopped, before a page counts.

Huge pages: when a page of a protected transparent huge page is written the kernel splits it, so the log stays exact;
a page of hugetlbfs is reported whole (`exact` is False then). With protection on, no new huge page arises.

What the kernel does when mappings change, and what we make of it:

- unmapped or moved away, or the process ended: the scan passes over it without a word. So after every scan we ask what
is mapped (trackers/mappings.py): TrackerError.
- the same memory mapped anew: not registered, the scan fails with EPERM and what it had found is lost: it is registered
again and the harvest says `overflowed`. Another file at the place: TrackerError.
- MADV_DONTNEED of private anonymous memory: pages are reported as written, as they now read as zeros. Kernels that miss
this where a whole page table is gone are searched for such holes with a second scan.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from ckptd.errors import TrackerError, TrackerUnavailable
from ckptd.memory.dirtyset import DirtySet, Gfns, gfns_of_runs
from ckptd.memory.regions import Geometry
from ckptd.trackers import userfaultfd
from ckptd.trackers.injection import take_userfaultfd
from ckptd.trackers.mappings import ProcessMemory
from ckptd.units import PAGE_SIZE

__all__ = ["PagemapTracker"]

_RUNS = 1 << 15  # that one scan can hold; with more it goes on in another
_AT_ONCE = 512  # runs that the kernel collects before it hands them out; a walk of fewer is one
_SHIFT = PAGE_SIZE.bit_length() - 1
_NOTHING: Gfns = np.empty(0, dtype=np.int64)


class PagemapTracker:
    """`addresses`: where each region of the geometry begins in the memory of process `pid`."""

    __slots__ = ("_geometry", "_lost", "_memory", "_pagemap", "_restored", "_scans", "_uffd", "_vector")

    name = "pagemap"
    needs_pause = False

    def __init__(self, geometry: Geometry, pid: int, addresses: Sequence[int]) -> None:
        self._geometry = geometry
        self._memory = ProcessMemory(geometry, pid, addresses)
        self._uffd = self._pagemap = -1
        self._lost = False
        self._restored: DirtySet | None = None
        self._vector = np.zeros((_RUNS, 3), dtype=np.int64)
        self._scans: list[bytearray] = []

    @property
    def exact(self) -> bool:
        """False for a region on hugetlbfs, and where the kernel did not say; known from start on."""
        return self._memory.exact_pages

    def start(self) -> None:
        """Attach, unless attached; then protect everything. Raises TrackerUnavailable, TrackerError."""
        attached = self._uffd >= 0
        try:
            if not attached:
                self._attach()
            self._arm()
            self._memory.check()
            self._lost = False
            self._take()  # it does work here; and what was written while we armed is none of this log
        except BaseException:
            self.stop()
            raise
        self._restored = None
        if self._lost:
            self.stop()
            raise TrackerError(f"mappings of process {self._memory.pid} change while tracking starts", hint="try again")

    def harvest(self) -> DirtySet:
        if self._uffd < 0:
            raise TrackerError("pagemap is not started", hint="start it and send everything again")
        dirty = self._take()
        if self._lost:
            self._arm()
            self._memory.check()
            dirty, self._lost = DirtySet.empty(len(self._geometry), overflowed=True), False
        if self._restored is not None:
            dirty, self._restored = dirty.merge(self._restored), None
        return dirty

    def restore(self, dirty: DirtySet) -> None:
        self._restored = dirty if self._restored is None else self._restored.merge(dirty)

    def stop(self) -> None:
        if self._uffd >= 0:
            for start, end in self._memory.ranges:
                with suppress(OSError):  # unmapped, or the process is gone; closing undoes the rest
                    userfaultfd.unregister(self._uffd, start, end)
            os.close(self._uffd)
        if self._pagemap >= 0:
            os.close(self._pagemap)
        self._memory.close()
        self._uffd = self._pagemap = -1
        self._restored = None

    def _attach(self) -> None:
        self._memory.open()
        pid = self._memory.pid
        try:
            self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise TrackerUnavailable(
                f"/proc/{pid}/pagemap: {error.strerror}",
                hint="run as root or with CAP_SYS_PTRACE; use a kernel with CONFIG_PROC_PAGE_MONITOR",
            ) from error
        self._uffd = take_userfaultfd(pid)
        userfaultfd.set_up(self._uffd)
        kinds = [userfaultfd.WRITTEN] + ([userfaultfd.ABSENT] if userfaultfd.hides_holes() else [])
        self._scans = [userfaultfd.scan_argument(kind, self._vector.ctypes.data, _RUNS) for kind in kinds]

    def _arm(self) -> None:
        """Register what is mapped now and protect all of it."""
        for name, (start, end) in zip(self._memory.names, self._memory.ranges, strict=True):
            try:
                userfaultfd.register(self._uffd, start, end)
                userfaultfd.write_protect(self._uffd, start, end)
            except OSError as error:
                raise self._not_armed(error, name) from error

    def _not_armed(self, error: OSError, name: str) -> TrackerError:
        if error.errno == errno.ESRCH:
            return self._memory.gone()
        try:
            self._memory.check()
        except TrackerError as changed:
            return changed
        if error.errno == errno.EBUSY:
            return TrackerUnavailable(
                "this memory belongs to another userfaultfd", region=name,
                hint="end what uses it: post-copy, a background snapshot, or another ckptd",
            )  # fmt: skip
        return TrackerUnavailable(
            f"the kernel does not protect this memory: {error.strerror}", region=name,
            hint="give the guest anonymous memory, a memfd or a file; a region on hugetlbfs must be whole huge pages",
        )  # fmt: skip

    def _take(self) -> DirtySet:
        """What was written. Sets `_lost` where that is not known; it stays set when this raises."""
        lost, self._lost = self._lost, True
        dirty: list[Gfns] = []
        for start, end in self._memory.ranges:
            try:
                found = [self._walk(argument, start, end) for argument in self._scans]
            except PermissionError:
                found, lost = [_NOTHING], True
            except OSError as error:
                raise self._not_scanned(error) from error
            dirty.append(found[0] if len(found) == 1 else np.unique(np.concatenate(found)))
        # Only now: what is unmapped after the scan was still seen by it, and what is mapped anew fails the next one.
        self._memory.check()
        self._lost = lost
        return DirtySet(dirty)

    def _walk(self, argument: bytearray, start: int, end: int) -> Gfns:
        at, parts = start, []
        while at < end:
            count, at = userfaultfd.walk_from(self._pagemap, argument, at, end)
            if count:
                runs = (self._vector[:count, :2] - start) >> _SHIFT
                parts.append(gfns_of_runs(runs[:, 0], runs[:, 1] - runs[:, 0]))
        if len(parts) == 1 and len(parts[0]) < _AT_ONCE:
            return parts[0]
        gfns = np.concatenate(parts) if parts else _NOTHING
        # Of a long walk beside a guest that writes, the kernel (6.18) may report an end before the one that it has
        # reached: what was written there since is then found once more.
        return np.unique(gfns) if len(gfns) and (gfns[1:] <= gfns[:-1]).any() else gfns

    def _not_scanned(self, error: OSError) -> TrackerError:
        if error.errno in (errno.ENOTTY, errno.EINVAL) and (lacks := userfaultfd.kernel_lacks()):
            return lacks
        if error.errno == errno.ESRCH:
            return self._memory.gone()
        return TrackerError(f"PAGEMAP_SCAN of process {self._memory.pid}: {error.strerror}")
