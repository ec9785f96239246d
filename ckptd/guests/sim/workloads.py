"""What the programs of the sim guest touch: a region for each step, and a page and a word in it for each access.

Pure functions of (chance, counters, vcpu, pages): integers only, so that every machine computes the same. `chance`
holds one random u64 for each access and one more for each step, in the last column; counters are the steps that this
vCPU has made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ckptd.units import PAGE_SIZE

__all__ = ["WORKLOADS", "Accesses", "Layout", "Workload"]

U64 = npt.NDArray[np.uint64]

_WORDS = np.uint64(PAGE_SIZE // 8)
_SPREAD = np.uint64(2147483647)  # a prime below 2**31: scatters ranks over a region without leaving u64
_SEVEN = np.uint64(7)
_FEW = np.uint64(8)


@dataclass(frozen=True, slots=True)
class Accesses:
    """A block of steps of one vCPU: accesses[i, :stores[i]] are read and written, the rest are only read."""

    regions: npt.NDArray[np.int64]  # (steps,)
    gfns: U64  # (steps, accesses)
    words: U64  # (steps, accesses), 0 to 511
    stores: npt.NDArray[np.int64]  # (steps,)


class Layout:
    """Pages of all regions end to end, to choose a region by its size."""

    __slots__ = ("bits", "ends", "pages", "starts", "total")

    def __init__(self, pages: list[int]) -> None:
        self.pages = np.array(pages, dtype=np.uint64)
        self.bits = np.array([one.bit_length() for one in pages], dtype=np.uint64)
        self.ends = np.cumsum(self.pages)
        self.starts = self.ends - self.pages
        self.total = self.ends[-1]

    def region_of(self, places: U64) -> npt.NDArray[np.int64]:
        regions: npt.NDArray[np.int64] = np.searchsorted(self.ends, places % self.total, side="right")
        return regions


Pick = Callable[[U64, U64, int, int, Layout], Accesses]


@dataclass(frozen=True, slots=True)
class Workload:
    """`pick` chooses the accesses; `replies`: an output is the value just read, not only the registers."""

    pick: Pick
    replies: bool = False
    written: float = 1.0
    """The part of a step's accesses that are stores, for a rate in pages a second."""


def _uniform(chance: U64, counters: U64, vcpu: int, vcpus: int, layout: Layout) -> Accesses:
    """Any page alike."""
    regions = layout.region_of(chance[:, -1])
    gfns = (chance[:, :-1] >> np.uint64(9)) % layout.pages[regions, None]
    return _all_stores(regions, gfns, chance)


def _zipf(chance: U64, counters: U64, vcpu: int, vcpus: int, layout: Layout) -> Accesses:
    """Few pages often, many seldom: the rank of a page is log-uniform, as under Zipf's law with exponent 1."""
    regions = layout.region_of(chance[:, -1])
    return _all_stores(
        regions, _popular(chance[:, :-1], layout.pages[regions, None], layout.bits[regions, None]), chance
    )


def _sequential(chance: U64, counters: U64, vcpu: int, vcpus: int, layout: Layout) -> Accesses:
    """Each vCPU walks through all memory, from a start of its own."""
    width = chance.shape[1] - 1
    start = layout.total * np.uint64(vcpu) // np.uint64(vcpus)
    place = (counters * np.uint64(width) + start) % layout.total
    regions = layout.region_of(place)
    first = place - layout.starts[regions]
    gfns = (first[:, None] + np.arange(width, dtype=np.uint64)) % layout.pages[regions, None]
    return _all_stores(regions, gfns, chance)


def _kv(chance: U64, counters: U64, vcpu: int, vcpus: int, layout: Layout) -> Accesses:
    """A hash table, a bucket of eight keys to a page: as many puts as gets of popular keys; outputs are the gets'
    replies."""
    regions = layout.region_of(chance[:, -1])
    gfns = _popular(chance[:, :-1], layout.pages[regions, None], layout.bits[regions, None])
    slots = (chance[:, :-1] & _SEVEN) << np.uint64(6)
    half = max(1, gfns.shape[1] // 2)
    return Accesses(regions, gfns, slots, np.full(len(gfns), half))


def _idle(chance: U64, counters: U64, vcpu: int, vcpus: int, layout: Layout) -> Accesses:
    """One store a step, to one of eight pages: a guest that waits."""
    regions = np.zeros(len(chance), dtype=np.int64)
    gfns = (chance[:, :-1] >> np.uint64(9)) % np.minimum(_FEW, layout.pages[0])
    return Accesses(regions, gfns, chance[:, :-1] % _WORDS, np.ones(len(chance), dtype=np.int64))


def _bursts(chance: U64, counters: U64, vcpu: int, vcpus: int, layout: Layout) -> Accesses:
    """64 steps of uniform stores, then 192 quiet ones of one store to few pages."""
    busy = counters // np.uint64(64) % np.uint64(4) == 0
    one, other = _uniform(chance, counters, vcpu, vcpus, layout), _idle(chance, counters, vcpu, vcpus, layout)
    return Accesses(
        np.where(busy, one.regions, other.regions),
        np.where(busy[:, None], one.gfns, other.gfns),
        one.words,
        np.where(busy, one.stores, other.stores),
    )


WORKLOADS: dict[str, Workload] = {
    "uniform": Workload(_uniform),
    "zipf": Workload(_zipf),
    "sequential": Workload(_sequential),
    "kv": Workload(_kv, replies=True, written=0.5),
    "idle": Workload(_idle),
    "bursts": Workload(_bursts),
}


def _popular(chance: U64, pages: U64, bits: U64) -> U64:
    octave = (chance >> np.uint64(50)) % bits
    below = (np.uint64(1) << octave) - np.uint64(1)
    ranks = below + ((chance >> np.uint64(9)) & below)
    return ranks % pages * _SPREAD % pages


def _all_stores(regions: npt.NDArray[np.int64], gfns: U64, chance: U64) -> Accesses:
    return Accesses(regions, gfns, chance[:, :-1] % _WORDS, np.full(len(gfns), gfns.shape[1]))
