"""KVM's dirty ring: each vCPU writes the pages that it dirties into a ring in memory that we map.

    struct kvm_dirty_gfn, entry n of a ring at n mod size
    0  u32 flags     00 free -> 01 dirty (the vCPU) -> 1X harvested (we) -> 00 (KVM_RESET_DIRTY_RINGS)
    4  u32 slot      address space << 16 | memslot; our memslots are numbered as the regions
    8  u64 offset    gfn within the memslot

Order of accesses (api.rst 8.29): the flags are read with acquire before slot and offset, and written with release after
them. x86 keeps the order of loads among themselves, and of stores after earlier loads, so plain accesses will do; on
another machine they would not. Entries are harvested strictly in sequence, and the rings are reset, which
write-protects the pages again, before anybody reads a page. A harvest costs by the number of dirty pages.

*A ring can lose pages without a word.* The kernel looks whether a ring is full when the vCPU comes back to it. Between
two looks a vCPU may log more (a PML buffer of 512; a batch of emulated instructions where paging is done by software),
and what no longer fits overwrites what nobody has harvested, after which the kernel's place in the ring and ours
differ. Nothing in the ring shows that. So whatever *may* be such an overrun counts as one: `overflowed`, the VM is
rebuilt with empty rings, and everything is resent:

- more than size minus reserve entries were harvested from a ring;
- or that many are taken by the time of the reset: the vCPU may have come round to what we were reading;
- the reset gave back another number than we harvested, or an entry names no page of the guest;
- a vCPU waits on a full ring in which we found nothing.

The rules and the figures behind the reserve: Documentation/virt/kvm/api.rst 8.29, virt/kvm/dirty_ring.c, and
tools/testing/selftests/kvm/dirty_log_test.c.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ckptd.errors import TrackerUnavailable
from ckptd.memory.dirtyset import DirtySet, Gfns
from ckptd.memory.regions import Geometry
from ckptd.trackers.kvm_log import KvmLog, KvmTracker

__all__ = ["ENTRY", "KvmRingTracker"]

ENTRY = np.dtype([("flags", "<u4"), ("slot", "<u4"), ("offset", "<u8")])
_DIRTY, _HARVESTED = 1, 2
_LOOK = 256  # entries that are looked at first; then as many as the last harvest had, and _MORE
_MORE = 16
_SOME, _MANY = 256, 2048  # places from which on sorting by 16 bits is faster, once or twice


class _Ring:
    """A ring as numbers, and where in it we are. Made once: views of its fields cost as much as a small harvest."""

    __slots__ = ("flags", "last", "look", "next", "offsets", "size", "slots", "start", "tested")

    def __init__(self, ring: npt.NDArray[np.void], only_slot_0: bool) -> None:
        self.size = len(ring)
        self.last = self.size - 1
        self.next = 0  # free-running, as the kernel's own
        self.start = 0  # where the harvest under way began
        self.look = _LOOK
        self.flags: npt.NDArray[np.uint32] = ring["flags"]
        self.slots: npt.NDArray[np.uint32] = ring["slot"]
        self.offsets: npt.NDArray[np.int64] = ring["offset"].view(np.int64)
        # Flags and slot make one word, which is _DIRTY where an entry of slot 0 is: one comparison tests both.
        self.tested = ring.view(np.uint64)[::2] if only_slot_0 else self.flags


class KvmRingTracker(KvmTracker):
    """`reserve`: entries that a vCPU may log between two looks of the kernel at its ring (guests/kvm/host.py)."""

    __slots__ = ("_edges", "_end", "_one_region", "_pages", "_reserve", "_rings", "overflows")

    name = "kvm-ring"

    def __init__(self, geometry: Geometry, log: KvmLog, *, exact: bool, entries: int, reserve: int) -> None:
        if entries < 2 * reserve:
            raise TrackerUnavailable(
                f"a ring of {entries} entries is too small here: a vCPU may log {reserve} pages before it is stopped",
                hint=f"guest.ring_entries = {1 << (2 * reserve - 1).bit_length()} or more",
            )
        super().__init__(geometry, log, exact=exact)
        self._reserve = reserve
        self._rings: list[_Ring] = []
        self._one_region = len(geometry) == 1
        # A page's place is its number in the whole guest: region i has the places from edge i to edge i + 1.
        self._pages = np.array([region.pages for region in geometry], dtype=np.uint64)
        self._edges = np.concatenate(([0], self._pages.cumsum())).astype(np.int64)
        self._end = int(self._edges[-1])
        self.overflows = 0

    @property
    def half_full(self) -> bool:
        """A ring is half full: better harvest it before its vCPU is stopped, or overruns it."""
        return self._started and any(
            ring.flags.item((ring.next + ring.size // 2) & ring.last) == _DIRTY for ring in self._rings
        )

    def _begin(self) -> None:
        # The kernel does not say where in a ring it is, so a log begins with rings that nobody has written.
        self._log.arm(False)
        self._anew()

    def _anew(self) -> None:
        self._rings.clear()  # a VM lives as long as a mapping of its rings
        self._log.rebuild()
        self._log.arm(True)
        self._rings.extend(_Ring(ring, self._one_region) for ring in self._log.rings)

    def stop(self) -> None:
        if self._started:
            super().stop()
            self._drain()

    def _take(self) -> DirtySet:
        log, waiting = self._log, self._log.waiting_on_full()
        places, taken, sound = self._collect()
        reset = log.reset_rings()
        for ring in self._rings:
            if ring.flags.item((ring.start + ring.size - self._reserve) & ring.last) == _DIRTY:
                sound = False
        gfns = self._by_region(places)
        if gfns is not None and sound and reset == taken and (taken or not waiting):
            return DirtySet(gfns)
        self.overflows += 1
        self._anew()
        return DirtySet(gfns or DirtySet.empty(len(self._geometry)).gfns, overflowed=True)

    def _collect(self) -> tuple[Gfns, int, bool]:
        """Read and mark what is dirty in every ring: places, how many entries, and whether nothing was wrong."""
        parts: list[Gfns] = []
        taken, sound, one_region = 0, True, self._one_region
        for ring in self._rings:
            ring.start = at = ring.next & ring.last
            # Compared once: the vCPU may make the first clean entry a dirty one at any time.
            clean = ring.tested[at : at + ring.look] != _DIRTY
            count = int(clean.argmax())
            if not clean.item(count):
                count = _dirty_from(ring.tested, at, ring.look)
            end = at + count
            if one_region and ring.slots.item(end & ring.last):
                sound = False  # the entry that ends the harvest, and may be dirty, is of a slot that nobody has
            if count > ring.size - self._reserve:
                sound = False
            if one_region and end <= ring.size:  # written out: it is most harvests, and a small one feels every call
                parts.append(ring.offsets[at:end].copy())  # pages if the least and the greatest are: see _by_region
                ring.flags[at:end] = _HARVESTED
            else:
                sound &= self._take_pieces(ring, at, end, parts)
            ring.next += count
            ring.look = count + (count >> 3) + _MORE
            taken += count
        if len(parts) == 1:
            return parts[0], taken, sound
        return np.concatenate(parts) if parts else np.empty(0, np.int64), taken, sound

    def _take_pieces(self, ring: _Ring, at: int, end: int, parts: list[Gfns]) -> bool:
        """The same around the end of the ring, and for any number of regions; False if an entry is no page."""
        sound = True
        for first, stop in ((at, min(end, ring.size)), (0, max(0, end - ring.size))):
            places = ring.offsets[first:stop].copy() if self._one_region else self._places(ring, first, stop)
            if places is None:
                sound = False
            elif len(places):
                parts.append(places)
            ring.flags[first:stop] = _HARVESTED
        return sound

    def _places(self, ring: _Ring, first: int, stop: int) -> Gfns | None:
        """Of these entries, in their order; None if one names no page of the guest."""
        offsets, slots = ring.offsets[first:stop], ring.slots[first:stop].astype(np.intp)
        if not len(slots):
            return offsets
        # Compared without sign: what is below zero is too large.
        if _any(slots >= len(self._pages)) or _any(offsets.view(np.uint64) >= self._pages[slots]):
            return None
        return offsets + self._edges[slots]

    def _by_region(self, places: Gfns) -> list[Gfns] | None:
        """Sorted, unique, by region; None if a place is in no region."""
        count, end = len(places), self._end
        if count >= _SOME and (end <= 1 << 16 or (count >= _MANY and end <= 1 << 32)):
            if _any(places.view(np.uint64) >= end):
                return None
            places = _sorted(places, end)
        elif count:
            places.sort()
            if places.item(0) < 0 or places.item(-1) >= end:
                return None
        if count > 1 and _any(same := places[1:] == places[:-1]):
            places = places[np.concatenate(([True], ~same))]
        if self._one_region:
            return [places]
        bounds = places.searchsorted(self._edges)
        return [places[start:stop] - edge for (start, stop), edge in zip(pairwise(bounds), self._edges, strict=False)]

    def _drain(self) -> None:
        """Nobody harvests any more: vCPUs that wait on a full ring go on."""
        self._collect()
        self._log.reset_rings()


def _any(true: npt.NDArray[np.bool_]) -> bool:
    """Of at least one. numpy's own goes through Python, which shows in a small harvest."""
    found: bool = true.item(true.argmax())
    return found


def _sorted(places: Gfns, end: int) -> Gfns:
    """Sorts what is less than `end`, at most 2**32: numpy sorts numbers of 16 bits by counting."""
    if end <= 1 << 16:
        narrow = places.astype(np.uint16)
        narrow.sort(kind="stable")
        return narrow.astype(np.int64)
    places = places[places.astype(np.uint16).argsort(kind="stable")]
    return places[(places >> 16).astype(np.uint16).argsort(kind="stable")]


def _dirty_from(tested: npt.NDArray[np.uint32] | npt.NDArray[np.uint64], at: int, look: int = _LOOK) -> int:
    """How many entries in sequence, from `at` on and around, are dirty. Looks at a piece first, then at more."""
    size, count = len(tested), 0
    while count < size:
        begin = (at + count) & (size - 1)
        # Compared once: the vCPU may make the first clean entry a dirty one at any time.
        clean = tested[begin : min(begin + look, size, begin + size - count)] != _DIRTY
        first = clean.argmax()
        if clean.item(first):
            return count + int(first)
        count += len(clean)
        look *= 4
    return count
