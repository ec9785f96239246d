"""The bitmap: one bit for each page of memory, set by the guest, scanned and cleared by the harvest.

    offset 0     u64  armed: 1 while a tracker harvests
    offset 64    u64  bitmap of region 0, bit 0 of word 0 is gfn 0, whole cache lines
    ...               bitmap of region 1, and so on

Never overflows and holds no page twice. A harvest costs one pass over the map, so its cost follows the size of the
memory and not the number of dirty pages: the complaint that the ring answers. Taking and clearing are two steps here,
and so is setting a bit, so both sides must not run at once: `needs_pause`. Knows nothing of whose memory the map is
in.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ckptd.errors import TrackerError
from ckptd.memory.dirtyset import DirtySet, Gfns, gfns_of_bitmap
from ckptd.memory.regions import Geometry
from ckptd.trackers.base import Buffer

__all__ = ["BitmapLog", "BitmapTracker", "bitmap_log_bytes"]

_LINE = 8  # words of a cache line
_ARMED = 0
_BIT = np.uint64(1) << np.arange(64, dtype=np.uint64)


def bitmap_log_bytes(geometry: Geometry) -> int:
    """Bytes of shared memory that the log of a guest takes."""
    return 8 * (_LINE + sum(_words(region.pages) for region in geometry))


class BitmapLog:
    """The guest's side. One writer at a time (all vCPUs of a process that runs them in turn). Never full."""

    __slots__ = ("_head", "_maps")

    full = False

    def __init__(self, geometry: Geometry, buffer: Buffer) -> None:
        self._head, self._maps = _views(geometry, buffer)

    def mark(self, vcpu: int, region: int, gfns: Gfns) -> int:
        if self._head[_ARMED]:
            # ufunc.at, because two pages of a batch may share a word
            np.bitwise_or.at(self._maps[region], gfns >> 6, _BIT[gfns & 63])
        return 0

    def disarm(self) -> None:
        self._head[_ARMED] = 0


class BitmapTracker:
    """The harvester's side, over the same `buffer` of `bitmap_log_bytes(geometry)` bytes."""

    __slots__ = ("_geometry", "_head", "_maps", "_restored")

    name = "bitmap"
    exact = True
    needs_pause = True

    def __init__(self, geometry: Geometry, buffer: Buffer) -> None:
        self._geometry = geometry
        self._head, self._maps = _views(geometry, buffer)
        self._restored = DirtySet.empty(len(geometry))

    def start(self) -> None:
        for words in self._maps:
            words.fill(0)
        self._restored = DirtySet.empty(len(self._geometry))
        self._head[_ARMED] = 1

    def harvest(self) -> DirtySet:
        if not self._head[_ARMED]:
            raise TrackerError("the bitmap is not started", hint="start it and send everything again")
        gfns = []
        for region, words in zip(self._geometry, self._maps, strict=True):
            found = gfns_of_bitmap(words, region.pages)
            words[found >> 6] = 0  # only the words that held something: clearing costs by the dirty pages, too
            gfns.append(found)
        dirty = self._restored.merge(DirtySet(gfns))
        self._restored = DirtySet.empty(len(self._geometry))
        return dirty

    def restore(self, dirty: DirtySet) -> None:
        self._restored = self._restored.merge(dirty)

    def stop(self) -> None:
        self._head[_ARMED] = 0


def _words(pages: int) -> int:
    return -(-pages // (64 * _LINE)) * _LINE


def _views(geometry: Geometry, buffer: Buffer) -> tuple[npt.NDArray[np.uint64], list[npt.NDArray[np.uint64]]]:
    words = buffer.view(np.uint64)
    if words.nbytes < bitmap_log_bytes(geometry):
        raise TrackerError(f"a bitmap of {geometry} takes {bitmap_log_bytes(geometry)} bytes, not {words.nbytes}")
    maps, start = [], _LINE
    for region in geometry:
        maps.append(words[start : start + _words(region.pages)])
        start += _words(region.pages)
    return words[:_LINE], maps
