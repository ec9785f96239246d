"""The bare peers of `ckptd bench harvest`: the ioctls that no harvest can do without, and the least scan of what they
leave that yields a set of page numbers: ascending, and none twice.

A bitmap is such a set already; a ring is a list in the order of the writes, in which a page may be twice, so its scan
ends with a sort. What reading the list alone costs is measured beside it (`unsorted_way`). Nothing is checked or kept,
and all arguments are made beforehand. No scan is the cheapest for every memory and every number of pages, so there are
several, and the bench takes the one that was the cheapest in its run. This is the one place that reaches behind the
trackers: it calls the VM itself, and moves on the tracker's place in the ring.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ckptd.guests.kvm import abi
from ckptd.guests.kvm.machine import Machine
from ckptd.memory.dirtyset import Gfns
from ckptd.trackers.kvm_log import KvmTracker, Words
from ckptd.trackers.kvm_ring import KvmRingTracker, _sorted

__all__ = ["SCANS", "Way", "bare_ways", "unsorted_way"]

Way = Callable[[], Gfns]
"""Takes what is dirty, and resets it."""


def bare_ways(machine: Machine, tracker: KvmTracker) -> dict[str, Way]:
    """By name, for the log that this tracker takes; the guest has one region and one vCPU."""
    if isinstance(tracker, KvmRingTracker):
        return _ring_ways(machine, tracker)
    return _bitmap_ways(machine, manual=tracker.name == "kvm-manual")


# --- scans of a bitmap


def _all_bits(words: Words) -> Gfns:
    found: Gfns = np.unpackbits(words.view(np.uint8), bitorder="little").view(np.bool_).nonzero()[0]
    return found


def _bits_of_words(words: Words) -> Gfns:
    index = (words != 0).nonzero()[0]
    bits = np.unpackbits(words[index].view(np.uint8), bitorder="little").view(np.bool_).nonzero()[0]
    found: Gfns = (index[bits >> 6] << 6) + (bits & 63)
    return found


def _bits_of_bytes(words: Words) -> Gfns:
    octets = words.view(np.uint8)
    index = (octets != 0).nonzero()[0]
    bits = np.unpackbits(octets[index], bitorder="little").view(np.bool_).nonzero()[0]
    found: Gfns = (index[bits >> 3] << 3) + (bits & 7)
    return found


def _bits_of_bytes_of_words(words: Words) -> Gfns:
    index = (words != 0).nonzero()[0]
    octets = words[index].view(np.uint8)
    at = (octets != 0).nonzero()[0]
    base = (index[at >> 3] << 6) + ((at & 7) << 3)
    bits = np.unpackbits(octets[at], bitorder="little").view(np.bool_).nonzero()[0]
    found: Gfns = base[bits >> 3] + (bits & 7)
    return found


SCANS: dict[str, Callable[[Words], Gfns]] = {
    "all bits": _all_bits, "words": _bits_of_words, "bytes": _bits_of_bytes, "words, bytes": _bits_of_bytes_of_words,
}  # fmt: skip
"""Each yields the set bits of a map, in ascending order."""


# --- the ways


def _bitmap_ways(machine: Machine, *, manual: bool) -> dict[str, Way]:
    """GET_DIRTY_LOG and a scan; with manual clear one CLEAR_DIRTY_LOG, of the whole map or of what holds the bits."""
    ioctl, fd, pages = fcntl.ioctl, machine._vm.fd, machine.spec.geometry[0].pages
    words = np.zeros(-(-pages // 64), dtype=np.uint64)
    address = words.ctypes.data
    get = abi.DIRTY_LOG.pack(0, 0, address)
    whole = bytearray(abi.CLEAR_LOG.pack(0, pages, 0, address))
    part = bytearray(whole)
    pack = abi.CLEAR_LOG.pack_into

    def plain(scan: Callable[[Words], Gfns]) -> Way:
        def take() -> Gfns:
            ioctl(fd, abi.GET_DIRTY_LOG, get)
            return scan(words)

        return take

    def clear_all(scan: Callable[[Words], Gfns]) -> Way:
        def take() -> Gfns:
            ioctl(fd, abi.GET_DIRTY_LOG, get)
            ioctl(fd, abi.CLEAR_DIRTY_LOG, whole)
            return scan(words)

        return take

    def clear_part(scan: Callable[[Words], Gfns]) -> Way:
        def take() -> Gfns:
            ioctl(fd, abi.GET_DIRTY_LOG, get)
            found = scan(words)
            first, last = found.item(0) & ~63, found.item(-1) | 63
            pack(part, 0, 0, min(last + 1, pages) - first, first, address + (first >> 3))
            ioctl(fd, abi.CLEAR_DIRTY_LOG, part)
            return found

        return take

    if not manual:
        return {name: plain(scan) for name, scan in SCANS.items()}
    return {
        f"{name}; clear {how}": way(scan)
        for name, scan in SCANS.items()
        for how, way in (("all", clear_all), ("part", clear_part))
    }


def _ring_ways(machine: Machine, tracker: KvmRingTracker) -> dict[str, Way]:
    """The dirty entries read and marked in their order, RESET_DIRTY_RINGS, and the list made a set."""
    ring = machine.rings[0]
    end = machine.spec.geometry[0].pages

    def sort(found: Gfns) -> Gfns:
        found.sort()
        return found

    def sort_halves(found: Gfns) -> Gfns:
        return _sorted(found, end)

    def set_of(read: Way, order: Callable[[Gfns], Gfns]) -> Way:
        def take() -> Gfns:
            found = order(read())
            same = found[1:] == found[:-1]
            if len(same) and same.item(same.argmax()):
                found = found[np.concatenate(([True], ~same))]
            return found

        return take

    # Where slot 0 is dirty, flags and slot make one word that is 1, too.
    tested = {"flags": ring["flags"], "flags and slot": ring.view(np.uint64)[::2]}
    return {
        f"{name}; {how}": set_of(_reading(machine, tracker, flags), order)
        for name, flags in tested.items()
        for how, order in (("sort", sort), ("sort halves", sort_halves))
    }


def unsorted_way(machine: Machine, tracker: KvmTracker) -> Way | None:
    """The list of a ring as it is: less than a harvest has to yield. None for a bitmap."""
    return _reading(machine, tracker, machine.rings[0]["flags"]) if isinstance(tracker, KvmRingTracker) else None


def _reading(machine: Machine, tracker: KvmRingTracker, tested: npt.NDArray[np.uint32] | npt.NDArray[np.uint64]) -> Way:
    ioctl, fd, place, ring = fcntl.ioctl, machine._vm.fd, tracker._rings[0], machine.rings[0]
    size, last = len(ring), len(ring) - 1
    flags, offsets = ring["flags"], ring["offset"].view(np.int64)
    look = 256  # entries; then about as many as there were last time

    def take() -> Gfns:
        nonlocal look
        at = place.next & last
        if at + look <= size and (count := int((tested[at : at + look] != 1).argmax())):
            found = offsets[at : at + count].copy()
            flags[at : at + count] = 2
        else:  # around the end, or more than looked at
            order = np.arange(at, at + size) & last
            count = int((tested[order] != 1).argmax())
            found = offsets[order[:count]]
            flags[order[:count]] = 2
        ioctl(fd, abi.RESET_DIRTY_RINGS, 0)
        place.next += count
        look = count + (count >> 3) + 16
        return found

    return take
