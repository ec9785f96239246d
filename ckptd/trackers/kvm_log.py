"""What the trackers over KVM share: the seam to the VM whose log they take, and the writes that KVM does not log.

A KVM log is taken by ioctls that only the process which made the VM may call, so these trackers run there
(guests/kvm/process.py), and a daemon harvests through that process. KVM logs what the vCPUs write. What the VMM itself
writes to guest memory it has to say: `wrote`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ckptd.errors import TrackerError
from ckptd.memory.dirtyset import DirtySet, Gfns
from ckptd.memory.regions import Geometry

__all__ = ["KvmLog", "KvmTracker", "Words"]

Words = npt.NDArray[np.uint64]
"""A dirty bitmap: bit 0 of word 0 is gfn 0."""


class KvmLog(Protocol):
    """The dirty log of a VM, region by region. Each call is one ioctl and raises TrackerError where that fails."""

    def arm(self, logging: bool) -> None:
        """KVM_MEM_LOG_DIRTY_PAGES of every region on or off. Turning it on begins an empty log."""

    def get_dirty_log(self, region: int, words: Words) -> None:
        """KVM_GET_DIRTY_LOG into `words`; without manual clear it also resets the log and write-protects again."""

    def clear_dirty_log(self, region: int, first: int, pages: int, words: Words) -> None:
        """KVM_CLEAR_DIRTY_LOG: of so many pages from `first` on, forget and write-protect those whose bits are set.

        `words` is the map of the whole region. `first` is a multiple of 64, and so is `pages` unless it reaches the
        end of the region.
        """

    @property
    def rings(self) -> Sequence[npt.NDArray[np.void]]:
        """The dirty ring of each vCPU, as kvm_ring.ENTRY."""

    def reset_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS: give back what was harvested and write-protect it again; how many entries."""

    def waiting_on_full(self) -> bool:
        """A vCPU has left with KVM_EXIT_DIRTY_RING_FULL since the last reset, and waits."""

    def rebuild(self) -> None:
        """The same VM anew over the same memory, with empty rings: vCPUs are stopped, saved and restored."""


class KvmTracker:
    """The base of the three. `exact`: the host uses hardware paging, so that only written pages are logged."""

    __slots__ = ("_geometry", "_log", "_own", "_restored", "_started", "exact")

    name = ""
    needs_pause = False

    def __init__(self, geometry: Geometry, log: KvmLog, *, exact: bool) -> None:
        self.exact = exact
        self._geometry = geometry
        self._log = log
        self._started = False
        self._own: deque[tuple[int, int, int]] = deque()
        self._restored: DirtySet | None = None

    def start(self) -> None:
        self._begin()
        self._own.clear()
        self._restored = None
        self._started = True

    def harvest(self) -> DirtySet:
        if not self._started:
            raise TrackerError(f"{self.name} is not started", hint="start it and send everything again")
        dirty = self._take()
        if self._own:
            dirty = dirty.merge(self._own_writes())
        if self._restored is not None:
            dirty, self._restored = dirty.merge(self._restored), None
        return dirty

    def restore(self, dirty: DirtySet) -> None:
        self._restored = dirty if self._restored is None else self._restored.merge(dirty)

    def stop(self) -> None:
        if self._started:
            self._started = False
            self._log.arm(False)
            self._own.clear()

    def wrote(self, region: int, first: int, pages: int) -> None:
        """The VMM *has* written these pages (from any thread). Before the store it would be too early: a harvest in
        between would take the page with its old content and never report the store."""
        if self._started:
            self._own.append((region, first, pages))

    def _begin(self) -> None:
        """Begin an empty log."""
        self._log.arm(False)
        self._log.arm(True)

    def _take(self) -> DirtySet:
        """What KVM has logged; takes and resets."""
        raise NotImplementedError

    def _own_writes(self) -> DirtySet:
        found: list[list[Gfns]] = [[] for _ in self._geometry]
        while self._own:  # another thread may add meanwhile: one at a time, so that none is dropped
            region, first, pages = self._own.popleft()
            found[region].append(np.arange(first, first + pages, dtype=np.int64))
        return DirtySet.from_gfns([np.concatenate(one) if one else [] for one in found])
