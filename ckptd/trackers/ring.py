"""The ring: one for each vCPU, a list of the pages it has written, with three markers that only grow.

    offset 0      u64 written     entries the vCPU has logged                       moved by the guest
    offset 64     u64 harvested   entries the harvest has read                      moved by the harvest
    offset 128    u64 reset       entries whose places may be used again            moved by the harvest
    offset 192    u64 lost        pages that found no place, ever                   moved by the guest
    offset 256    u64 armed       1 while a tracker harvests                        set by the harvest
    offset 320    u64 entry[size] region << 32 | gfn; entry n is at n mod size      written by the guest

    reset <= harvested <= written <= reset + size

Each marker has one writer and a cache line of its own, so the two sides share no lock and no line that both write. A
harvest costs by the number of logged pages, whatever the size of the memory. Safe while the guest runs, one producer
and one consumer for each ring.

*Soft-full*: when fewer than `reserve` places are left the vCPU is told to stop until it has been harvested. The
reserve must cover what it may still log before it stops, one batch. What finds no place in spite of that is counted
in `lost`, and the next harvest is `overflowed`; so is one that finds more entries than the ring has places. Sources:
the 2016 thread on the KVM list and its heir, Linux Documentation/virt/kvm/api.rst, KVM_CAP_DIRTY_LOG_RING; the rules
of tools/testing/selftests/kvm/dirty_log_test.c.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ckptd.errors import ConfigError, TrackerError
from ckptd.memory.dirtyset import DirtySet, Gfns
from ckptd.memory.regions import Geometry
from ckptd.trackers.base import Buffer

__all__ = ["RingLog", "RingTracker", "ring_log_bytes"]

_LINE = 8
_WRITTEN, _HARVESTED, _RESET, _LOST, _ARMED = (line * _LINE for line in range(5))
_HEAD = 5 * _LINE
_GFN = (1 << 32) - 1

_U64 = npt.NDArray[np.uint64]


def ring_log_bytes(vcpus: int, entries: int) -> int:
    """Bytes of shared memory that the rings of a guest take. Raises ConfigError unless `entries` is a power of
    two."""
    if entries < 2 or entries & (entries - 1):
        raise ConfigError(f"a ring must have a power of two of entries, not {entries}", field="ring_entries")
    return 8 * vcpus * (_HEAD + entries)


class RingLog:
    """The guest's side. Each ring has one producer; the vCPUs may run in different threads."""

    __slots__ = ("_heads", "_limit", "_mask", "_rings", "_size")

    def __init__(self, vcpus: int, entries: int, reserve: int, buffer: Buffer) -> None:
        if not 0 < reserve < entries:
            raise ConfigError(f"a ring of {entries} entries cannot keep {reserve} in reserve", field="ring_entries")
        self._heads, self._rings = _views(vcpus, entries, buffer)
        self._size, self._mask, self._limit = entries, entries - 1, entries - reserve

    @property
    def full(self) -> bool:
        return any(head[_ARMED] and int(head[_WRITTEN]) - int(head[_RESET]) > self._limit for head in self._heads)

    def mark(self, vcpu: int, region: int, gfns: Gfns) -> int:
        head = self._heads[vcpu]
        if not head[_ARMED]:
            return 0
        written = int(head[_WRITTEN])
        fits = min(len(gfns), self._size - (written - int(head[_RESET])))
        entries = gfns[:fits].view(np.uint64) | np.uint64(region << 32)
        ring, start = self._rings[vcpu], written & self._mask
        until_end = min(fits, self._size - start)
        ring[start : start + until_end] = entries[:until_end]
        ring[: fits - until_end] = entries[until_end:]
        # The entries first, the marker last: x86 keeps the order of stores (TSO) and stores an aligned u64 in one
        # piece, so who sees the marker sees the entries. A machine with a weaker order would need a store-release
        # here.
        head[_WRITTEN] = written + fits
        lost = len(gfns) - fits
        if lost:
            head[_LOST] += np.uint64(lost)
        return lost

    def disarm(self) -> None:
        for head in self._heads:
            head[_ARMED] = 0


class RingTracker:
    """The harvester's side, over the same `buffer` of `ring_log_bytes(vcpus, entries)` bytes.

    `store_first`: the vCPU logs a page after it has stored to it, as our own guests do. Hardware logs before the
    store retires: a vCPU that leaves on a full ring may leave with its newest entry logged and the store still to
    come, unlogged. Then the newest entry of each ring is reported again, until a newer one shows that its store is
    done; the harvest is no longer exact.
    """

    __slots__ = ("_geometry", "_heads", "_known_lost", "_mask", "_newest", "_restored", "_rings", "_size", "exact")

    name = "ring"
    needs_pause = False

    def __init__(
        self, geometry: Geometry, vcpus: int, entries: int, buffer: Buffer, *, store_first: bool = True
    ) -> None:
        self._geometry = geometry
        self._heads, self._rings = _views(vcpus, entries, buffer)
        self._size, self._mask = entries, entries - 1
        self.exact = store_first
        self._restored = DirtySet.empty(len(geometry))
        self._known_lost = [0] * vcpus
        self._newest: list[_U64] = [np.empty(0, dtype=np.uint64)] * vcpus

    def start(self) -> None:
        for vcpu, head in enumerate(self._heads):
            head[_HARVESTED] = head[_RESET] = head[_WRITTEN]
            self._known_lost[vcpu] = int(head[_LOST])
            self._newest[vcpu] = np.empty(0, dtype=np.uint64)
            head[_ARMED] = 1
        self._restored = DirtySet.empty(len(self._geometry))

    def harvest(self) -> DirtySet:
        entries: list[_U64] = []
        overflowed = False
        for vcpu in range(len(self._heads)):
            taken, lost = self._take(vcpu)
            entries.append(taken)
            overflowed |= lost
        places = _unique(np.concatenate(entries))
        bounds = np.searchsorted(places, np.arange(len(self._geometry) + 1, dtype=np.uint64) << np.uint64(32))
        if bounds[-1] != len(places):
            raise TrackerError("the ring names a region that the guest does not have", region=int(places[-1] >> 32))
        dirty = DirtySet(
            [(places[start:end] & np.uint64(_GFN)).view(np.int64) for start, end in pairwise(bounds)],
            overflowed,
        )
        dirty, self._restored = self._restored.merge(dirty), DirtySet.empty(len(self._geometry))
        return dirty

    def restore(self, dirty: DirtySet) -> None:
        self._restored = self._restored.merge(dirty)

    def stop(self) -> None:
        for head in self._heads:
            head[_ARMED] = 0

    def _take(self, vcpu: int) -> tuple[_U64, bool]:
        head, ring = self._heads[vcpu], self._rings[vcpu]
        if not head[_ARMED]:
            raise TrackerError("the ring is not started", hint="start it and send everything again")
        written, harvested = int(head[_WRITTEN]), int(head[_HARVESTED])  # written before any entry
        waiting = written - harvested
        if waiting < 0:
            raise TrackerError("the ring's markers are damaged: more harvested than written", vcpu=vcpu)
        lost = int(head[_LOST])
        overflowed = waiting > self._size or lost != self._known_lost[vcpu]
        self._known_lost[vcpu] = lost
        start = harvested & self._mask
        waiting = min(waiting, self._size)
        until_end = min(waiting, self._size - start)
        # concatenate copies, so the places may be used again from here on
        taken = np.concatenate((ring[start : start + until_end], ring[: waiting - until_end]))
        head[_HARVESTED] = written
        # Re-arming the pages would stand between these two where the log is a hardware one; ours logs every store.
        head[_RESET] = written
        if not self.exact:
            newest = taken[-1:] if waiting else self._newest[vcpu]
            taken, self._newest[vcpu] = np.concatenate((self._newest[vcpu], taken)), newest.copy()
        return taken, overflowed


def _unique(places: _U64) -> _U64:
    """Sorted, without repetition. Twenty times as fast as np.unique, which hashes first."""
    places.sort()
    first = np.empty(len(places), dtype=bool)
    first[:1] = True
    np.not_equal(places[1:], places[:-1], out=first[1:])
    return places[first]


def _views(vcpus: int, entries: int, buffer: Buffer) -> tuple[list[_U64], list[_U64]]:
    words = buffer.view(np.uint64)
    if words.nbytes < ring_log_bytes(vcpus, entries):
        raise TrackerError(
            f"{vcpus} rings of {entries} take {ring_log_bytes(vcpus, entries)} bytes, not {words.nbytes}"
        )
    rows = words[: vcpus * (_HEAD + entries)].reshape(vcpus, _HEAD + entries)
    return [row[:_HEAD] for row in rows], [row[_HEAD:] for row in rows]
