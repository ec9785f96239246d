"""Dirty sets: the gfns of each region that were written since the last harvest.

Rules: the gfns of a region are sorted, unique int64 (the index type of numpy, so that a gather needs no conversion);
an `overflowed` set stands for "anything may have changed" and stays overflowed through merge. Immutable: every
operation makes a new set, arrays are shared and never written. No per-page Python anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ckptd.errors import TrackerError
from ckptd.memory.regions import Geometry

__all__ = ["DirtySet", "Gfns", "gfns_of_bitmap", "gfns_of_runs", "runs_of"]

Gfns = npt.NDArray[np.int64]

_NONE: Gfns = np.empty(0, dtype=np.int64)
_NONE.flags.writeable = False
_SMALL_MAP = 512  # words; a map that is expanded whole, 128 MiB of memory
_FEW_WORDS = 512  # words that are expanded whole; of more, their bytes are


class DirtySet:
    """Sorted unique gfns for each region, and whether the log lost some (`overflowed`)."""

    __slots__ = ("gfns", "overflowed")

    def __init__(self, gfns: Sequence[Gfns], overflowed: bool = False) -> None:
        """Takes arrays that are already sorted and unique; use `from_gfns` for any others."""
        self.gfns = tuple(gfns)
        self.overflowed = overflowed

    @classmethod
    def empty(cls, regions: int, overflowed: bool = False) -> DirtySet:
        return cls((_NONE,) * regions, overflowed)

    @classmethod
    def everything(cls, geometry: Geometry) -> DirtySet:
        """Every page of every region."""
        return cls([np.arange(region.pages, dtype=np.int64) for region in geometry])

    @classmethod
    def from_gfns(cls, gfns: Iterable[npt.ArrayLike], overflowed: bool = False) -> DirtySet:
        """Gfns of each region in any order, with any repetition."""
        return cls([np.unique(np.asarray(one, dtype=np.int64)) for one in gfns], overflowed)

    @property
    def pages(self) -> int:
        """How many pages are dirty. An overflowed set may lack some."""
        return sum(len(one) for one in self.gfns)

    def __bool__(self) -> bool:
        return self.overflowed or any(len(one) for one in self.gfns)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, DirtySet)
            and self.overflowed == other.overflowed
            and len(self.gfns) == len(other.gfns)
            and all(np.array_equal(mine, theirs) for mine, theirs in zip(self.gfns, other.gfns, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        lost = ", overflowed" if self.overflowed else ""
        return f"DirtySet({' + '.join(str(len(one)) for one in self.gfns)} pages{lost})"

    def merge(self, other: DirtySet) -> DirtySet:
        """The pages of either; overflowed if either is."""
        return DirtySet(
            [_union(mine, theirs) for mine, theirs in self._pairs(other)], self.overflowed or other.overflowed
        )

    def subtract(self, other: DirtySet) -> DirtySet:
        """The pages of this set that are not in the other. Raises TrackerError if the other overflowed."""
        if other.overflowed:
            raise TrackerError("cannot subtract a dirty set that overflowed: it does not say which pages it holds")
        return DirtySet(
            [np.setdiff1d(mine, theirs, assume_unique=True) for mine, theirs in self._pairs(other)], self.overflowed
        )

    def batches(self, max_pages: int) -> Iterator[tuple[int, Gfns]]:
        """(region, gfns) in ascending order, at most `max_pages` each, never across regions."""
        for region, gfns in enumerate(self.gfns):
            for start in range(0, len(gfns), max_pages):
                yield region, gfns[start : start + max_pages]

    def _pairs(self, other: DirtySet) -> Iterator[tuple[Gfns, Gfns]]:
        if len(self.gfns) != len(other.gfns):
            raise TrackerError(f"dirty sets of {len(self.gfns)} and {len(other.gfns)} regions cannot be combined")
        return zip(self.gfns, other.gfns, strict=True)


def _union(one: Gfns, other: Gfns) -> Gfns:
    if not len(other):
        return one
    if not len(one):
        return other
    both = np.concatenate((one, other))
    both.sort(kind="stable")  # merges two sorted runs in one pass; np.union1d hashes
    first = np.empty(len(both), dtype=np.bool_)
    first[0] = True
    np.not_equal(both[1:], both[:-1], out=first[1:])
    return both[first]


def gfns_of_bitmap(words: npt.NDArray[np.uint64], pages: int) -> Gfns:
    """The set bits of a u64 bitmap (bit 0 of word 0 is gfn 0), below `pages`.

    Reads the map a word at a time and expands only what is not zero: with few dirty pages the cost is one pass over the
    map, an eighth of a byte for each page of memory. A map that is small, or half full, is expanded as it is.
    """
    # numpy finds what is true in an array of bool ten times as fast as what is not zero in one of numbers.
    if len(words) <= _SMALL_MAP:  # as _bits: here a call shows
        gfns: Gfns = np.unpackbits(words.view(np.uint8), bitorder="little").view(np.bool_).nonzero()[0]
    else:
        index = (words != 0).nonzero()[0]
        if 2 * len(index) > len(words):
            gfns = _bits(words)
        elif len(index) < _FEW_WORDS:
            bits = _bits(words[index])
            gfns = (index[bits >> 6] << 6) + (bits & 63)
        else:  # the same once more, with bytes: most of a word is still zero
            octets = words[index].view(np.uint8)
            at = (octets != 0).nonzero()[0]
            base = (index[at >> 3] << 6) + ((at & 7) << 3)
            bits = _bits(octets[at])
            gfns = base[bits >> 3] + (bits & 7)
    return gfns[: np.searchsorted(gfns, pages)] if len(gfns) and gfns.item(-1) >= pages else gfns


def _bits(words: npt.NDArray[np.uint64] | npt.NDArray[np.uint8]) -> Gfns:
    found: Gfns = np.unpackbits(words.view(np.uint8), bitorder="little").view(np.bool_).nonzero()[0]
    return found


def runs_of(gfns: Gfns) -> tuple[Gfns, Gfns]:
    """(starts, lengths) of the runs of consecutive gfns in a sorted unique array."""
    if not len(gfns):
        return _NONE, _NONE
    first = np.flatnonzero(np.diff(gfns) != 1) + 1
    bounds = np.concatenate(([0], first, [len(gfns)]))
    return gfns[bounds[:-1]], np.diff(bounds)


def gfns_of_runs(starts: npt.ArrayLike, lengths: npt.ArrayLike) -> Gfns:
    """The inverse of `runs_of`: ascending, disjoint runs to gfns."""
    begin, count = np.asarray(starts, dtype=np.int64), np.asarray(lengths, dtype=np.int64)
    ends = np.cumsum(count)
    total = int(ends[-1]) if len(ends) else 0
    gfns: Gfns = np.arange(total, dtype=np.int64) + np.repeat(begin - (ends - count), count)
    return gfns
