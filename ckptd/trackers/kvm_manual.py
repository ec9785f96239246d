"""KVM's dirty bitmap with manual clear: KVM_GET_DIRTY_LOG only reads, KVM_CLEAR_DIRTY_LOG resets what was harvested.

KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2. Pages are write-protected again in pieces, just before they are copied, and only
those that this harvest reports: no long hold of the kernel's mmu_lock, fewer false re-dirties. A bit that was set
between the two calls stays set.

With KVM_DIRTY_LOG_INITIALLY_SET nothing is protected when logging begins: every bit is set, and the first harvest after
`start` says so and protects all of memory, a piece at a time, while the guest runs. So that harvest is not exact, and
attaching to a large guest needs no long pause.
Source: Documentation/virt/kvm/api.rst 4.117 and 7.18.
"""

from __future__ import annotations

from ckptd.memory.dirtyset import DirtySet, gfns_of_bitmap
from ckptd.memory.regions import Geometry
from ckptd.trackers.kvm_bitmap import empty_maps
from ckptd.trackers.kvm_log import KvmLog, KvmTracker

__all__ = ["KvmManualTracker"]

_PIECE = 1 << 18  # pages, a GiB of memory, cleared by one call
_SMALL = 1 << 15  # pages, 128 MiB: cleared whole, which costs less than to find out where


class KvmManualTracker(KvmTracker):
    __slots__ = ("_fresh", "_hardware", "_initially_set", "_maps")

    name = "kvm-manual"

    def __init__(self, geometry: Geometry, log: KvmLog, *, exact: bool, initially_set: bool) -> None:
        super().__init__(geometry, log, exact=exact)
        self._hardware = exact
        self._initially_set = initially_set
        self._fresh = False
        self._maps = empty_maps(geometry)

    def _begin(self) -> None:
        super()._begin()
        self._fresh = self._initially_set

    def _take(self) -> DirtySet:
        gfns, log = [], self._log
        for region, (words, pages) in enumerate(self._maps):
            log.get_dirty_log(region, words)
            found = gfns_of_bitmap(words, pages)
            if len(found) and pages <= _SMALL:
                log.clear_dirty_log(region, 0, pages, words)
            elif len(found):
                # What was harvested lies between these; the log takes pieces that begin and end with a word.
                first, end = found.item(0) & ~63, min((found.item(-1) | 63) + 1, pages)
                while first < end:
                    count = min(_PIECE, end - first)
                    log.clear_dirty_log(region, first, count, words)
                    first += count
            gfns.append(found)
        self.exact, self._fresh = self._hardware and not self._fresh, False
        return DirtySet(gfns)
