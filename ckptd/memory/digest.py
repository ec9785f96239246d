"""The image digest: one number for a whole guest memory, kept up to date from the dirty pages alone (P4).

    a, b          the two lanes of a page's hash
    place         region << 32 | gfn
    m0, m1        odd multipliers of the place: splitmix64(place) | 1, splitmix64(~place) | 1
    digest        (sum of m0*a, sum of m1*b) mod 2**64, as two little-endian u64, over the pages of all regions

The multipliers bind each content to its place, so two pages that swapped content change the digest. A commit subtracts
the old hashes of its pages and adds the new ones. Each side keeps the table of hashes, 16 bytes a page: 0.4 % of
memory.
Source of the mixing function: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ckptd.memory.dirtyset import DirtySet, Gfns
from ckptd.memory.hashing import Hashes, PageHasher, Rows, same
from ckptd.memory.regions import Geometry

__all__ = ["DIGEST_SIZE", "HashTable", "digest_bytes"]

DIGEST_SIZE = 16
_CHUNK = 1 << 16


class HashTable:
    """The hash of every page of a guest, and the digest of the whole.

    A new table is that of a memory of zeros. `storage`, one array (pages, 2) of u64 for each region, makes the table
    live in memory of the caller's (a mapped file); its content is then trusted as it stands.
    """

    __slots__ = ("_lanes", "_sum", "geometry", "hasher")

    def __init__(self, geometry: Geometry, hasher: PageHasher, storage: Sequence[Hashes] | None = None) -> None:
        self.geometry = geometry
        self.hasher = hasher
        if storage is None:
            self._lanes = [np.tile(hasher.zero, (region.pages, 1)) for region in geometry]
        else:
            self._lanes = list(storage)
        self._sum = self._total()

    @property
    def digest(self) -> bytes:
        """16 bytes."""
        return digest_bytes(self._sum)

    def region(self, index: int) -> Hashes:
        """All hashes of a region, shape (pages, 2), live: do not write."""
        return self._lanes[index]

    def lookup(self, region: int, gfns: Gfns) -> Hashes:
        """A copy of the hashes of these pages, shape (n, 2)."""
        return self._lanes[region][gfns]

    def update(self, region: int, gfns: Gfns, hashes: Hashes) -> Hashes:
        """Set the hashes of distinct pages and return the old ones; the digest follows."""
        lanes = self._lanes[region]
        old = lanes[gfns]
        m0, m1 = _multipliers(region, gfns)
        with np.errstate(over="ignore"):
            first = np.sum(m0 * (hashes[:, 0] - old[:, 0]), dtype=np.uint64)
            second = np.sum(m1 * (hashes[:, 1] - old[:, 1]), dtype=np.uint64)
            self._sum = (self._sum[0] + first, self._sum[1] + second)
        lanes[gfns] = hashes
        return old

    def differing(self, region: int, gfns: Gfns, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Which of these pages have another hash here."""
        return ~same(self._lanes[region][gfns], hashes)

    def copy(self) -> HashTable:
        """An independent table in private memory."""
        twin = HashTable.__new__(HashTable)
        twin.geometry, twin.hasher, twin._sum = self.geometry, self.hasher, self._sum
        twin._lanes = [lanes.copy() for lanes in self._lanes]
        return twin

    def rehash(self, memory: Sequence[Rows]) -> DirtySet:
        """Make this the table of `memory`, one array (pages, 4096) for each region; returns the pages that differed."""
        changed = []
        for region, rows in enumerate(memory):
            parts = [np.empty(0, dtype=np.int64)]
            for start in range(0, len(rows), _CHUNK):
                gfns = np.arange(start, min(start + _CHUNK, len(rows)), dtype=np.int64)
                hashes = self.hasher.hash_rows(rows[start : start + _CHUNK])
                different = self.differing(region, gfns, hashes)
                self.update(region, gfns[different], hashes[different])
                parts.append(gfns[different])
            changed.append(np.concatenate(parts))
        return DirtySet(changed)

    def _total(self) -> tuple[np.uint64, np.uint64]:
        first = second = np.uint64(0)
        with np.errstate(over="ignore"):
            for index, lanes in enumerate(self._lanes):
                for start in range(0, len(lanes), _CHUNK):
                    part = lanes[start : start + _CHUNK]
                    m0, m1 = _multipliers(index, np.arange(start, start + len(part), dtype=np.int64))
                    first = first + np.sum(m0 * part[:, 0], dtype=np.uint64)
                    second = second + np.sum(m1 * part[:, 1], dtype=np.uint64)
        return first, second


def digest_bytes(total: tuple[np.uint64, np.uint64]) -> bytes:
    """The two sums as 16 bytes."""
    return int(total[0]).to_bytes(8, "little") + int(total[1]).to_bytes(8, "little")


def _multipliers(region: int, gfns: Gfns) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    place = gfns.astype(np.uint64) | np.uint64(region << 32)
    return _splitmix64(place) | np.uint64(1), _splitmix64(~place) | np.uint64(1)


def _splitmix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        z = x + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
