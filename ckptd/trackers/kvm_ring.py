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

from collections.abc import Sequence
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
_PLACE = np.int64(1) << 40  # region * _PLACE + gfn sorts all pages of a guest

Ring = npt.NDArray[np.void]


class KvmRingTracker(KvmTracker):
    """`reserve`: entries that a vCPU may log between two looks of the kernel at its ring (guests/kvm/host.py)."""

    __slots__ = ("_next", "_reserve", "overflows")

    name = "kvm-ring"

    def __init__(self, geometry: Geometry, log: KvmLog, *, exact: bool, entries: int, reserve: int) -> None:
        if entries < 2 * reserve:
            raise TrackerUnavailable(
                f"a ring of {entries} entries is too small here: a vCPU may log {reserve} pages before it is stopped",
                hint=f"guest.ring_entries = {1 << (2 * reserve - 1).bit_length()} or more",
            )
        super().__init__(geometry, log, exact=exact)
        self._reserve = reserve
        self._next: list[int] = []
        self.overflows = 0

    @property
    def half_full(self) -> bool:
        """A ring is half full: better harvest it before its vCPU is stopped, or overruns it."""
        return self._started and any(
            ring["flags"][(at + len(ring) // 2) & (len(ring) - 1)] == _DIRTY
            for ring, at in zip(self._log.rings, self._next, strict=True)
        )

    def _begin(self) -> None:
        # The kernel does not say where in a ring it is, so a log begins with rings that nobody has written.
        self._log.arm(False)
        self._log.rebuild()
        self._log.arm(True)
        self._next = [0] * len(self._log.rings)

    def stop(self) -> None:
        if self._started:
            super().stop()
            self._drain()

    def _take(self) -> DirtySet:
        rings, waiting = self._log.rings, self._log.waiting_on_full()
        starts = list(self._next)
        places, sound = self._collect(rings)
        taken = sum(self._next) - sum(starts)
        reset = self._log.reset_rings()
        for ring, start in zip(rings, starts, strict=True):
            limit = len(ring) - self._reserve
            sound &= ring["flags"][(start + limit) & (len(ring) - 1)] != _DIRTY
        gfns = self._by_region(places)
        if gfns is not None and sound and reset == taken and (taken or not waiting):
            return DirtySet(gfns)
        self.overflows += 1
        self._log.rebuild()
        self._log.arm(True)
        self._next = [0] * len(self._log.rings)
        return DirtySet(gfns or DirtySet.empty(len(self._geometry)).gfns, overflowed=True)

    def _collect(self, rings: Sequence[Ring]) -> tuple[npt.NDArray[np.int64], bool]:
        """Read and mark what is dirty in every ring. The places, and whether no ring was too full."""
        parts, sound = [], True
        for vcpu, ring in enumerate(rings):
            start, size = self._next[vcpu], len(ring)
            count = _dirty_from(ring["flags"], start & (size - 1))
            if not count:
                continue
            sound &= count <= size - self._reserve
            at = start & (size - 1)
            for piece in (ring[at : at + count], ring[: max(0, at + count - size)]):
                if len(piece):
                    # A memslot that nobody has makes a place beyond every region, which is found below.
                    parts.append(piece["slot"] * _PLACE + piece["offset"].view(np.int64))
                    piece["flags"] = _HARVESTED
            self._next[vcpu] = start + count
        return (parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, np.int64)), sound

    def _by_region(self, places: npt.NDArray[np.int64]) -> list[Gfns] | None:
        """Sorted, unique, by region; None if a place is in no region."""
        places.sort()
        if len(places) > 1:
            first = np.empty(len(places), dtype=np.bool_)
            first[0] = True
            np.not_equal(places[1:], places[:-1], out=first[1:])
            if not first.all():
                places = places[first]
        if len(self._geometry) == 1:
            gfns = [places]
        else:
            edges = np.arange(len(self._geometry) + 1, dtype=np.int64) * _PLACE
            bounds = places.searchsorted(edges)
            if bounds[0] or bounds[-1] != len(places):
                return None
            gfns = [places[start:end] - edge for (start, end), edge in zip(pairwise(bounds), edges, strict=False)]
        for one, region in zip(gfns, self._geometry, strict=True):
            if len(one) and not (one[0] >= 0 and one[-1] < region.pages):
                return None
        return gfns

    def _drain(self) -> None:
        """Nobody harvests any more: vCPUs that wait on a full ring go on."""
        self._collect(self._log.rings)
        self._log.reset_rings()


def _dirty_from(flags: npt.NDArray[np.uint32], at: int) -> int:
    """How many entries in sequence, from `at` on and around, are dirty."""
    # Most harvests are small: look at a short piece first, then at four times as many.
    size, count, step = len(flags), 0, 256
    while count < size:
        begin = (at + count) & (size - 1)
        # Compared once: the vCPU may make the first clean entry a dirty one at any time.
        clean = flags[begin : min(begin + step, size, begin + size - count)] != _DIRTY
        first = int(clean.argmax())
        if clean[first]:
            return count + first
        count += len(clean)
        step *= 4
    return count
