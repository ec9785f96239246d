"""KVM's dirty bitmap, taken and reset in one step by KVM_GET_DIRTY_LOG.

The kernel copies the map out and write-protects every page in it again, a word of the map at a time, so the harvest may
run beside the guest: a write after its word was taken is in the next map. The map has a bit for each page of a region,
so a harvest costs by the size of memory, which is the complaint of the 2016 thread; nothing is ever lost.
Source: Documentation/virt/kvm/api.rst 4.8.
"""

from __future__ import annotations

import numpy as np

from ckptd.memory.dirtyset import DirtySet, gfns_of_bitmap
from ckptd.memory.regions import Geometry
from ckptd.trackers.kvm_log import KvmLog, KvmTracker, Words

__all__ = ["KvmBitmapTracker", "empty_maps"]


class KvmBitmapTracker(KvmTracker):
    __slots__ = ("_maps",)

    name = "kvm-bitmap"

    def __init__(self, geometry: Geometry, log: KvmLog, *, exact: bool) -> None:
        super().__init__(geometry, log, exact=exact)
        self._maps = empty_maps(geometry)

    def _take(self) -> DirtySet:
        gfns = []
        for region, (words, pages) in enumerate(self._maps):
            self._log.get_dirty_log(region, words)
            gfns.append(gfns_of_bitmap(words, pages))
        return DirtySet(gfns)


def empty_maps(geometry: Geometry) -> list[tuple[Words, int]]:
    """A bitmap for each region, in whole words, and the region's pages."""
    return [(np.zeros(-(-region.pages // 64), dtype=np.uint64), region.pages) for region in geometry]
