"""Page hashes: XXH3-128 of a page's 4,096 bytes, seeded at random for each pairing of primary and secondary.

A hash is the canonical (big-endian) 16-byte digest, read as two little-endian u64 lanes: what travels is the canonical
bytes, what is computed with are the lanes. It names the content alone, not the place, so a page of zeros has the same
hash everywhere and needs no bytes on the wire. The seed is secret enough that a guest cannot prepare two pages that
collide. Source: xxHash, XXH3 128 bits; not a cryptographic hash.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash

from ckptd.units import PAGE_SIZE

__all__ = ["HASH_SIZE", "Hashes", "PageHasher", "Rows", "same"]

HASH_SIZE = 16

Hashes = npt.NDArray[np.uint64]
"""Shape (n, 2): two lanes for each page."""
Rows = npt.NDArray[np.uint8]
"""Shape (n, 4096): pages."""

_LANE = np.dtype("<u8")


class PageHasher:
    """Hashes pages under one seed (64 bits)."""

    __slots__ = ("_seed", "_zero")

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._zero = self.hash_rows(np.zeros((1, PAGE_SIZE), dtype=np.uint8))[0]
        self._zero.flags.writeable = False

    @property
    def seed(self) -> int:
        return self._seed

    @property
    def zero(self) -> Hashes:
        """The hash of a page of zeros, shape (2,)."""
        zero: Hashes = self._zero
        return zero

    def hash_rows(self, rows: Rows) -> Hashes:
        """The hashes, shape (n, 2), of n contiguous pages."""
        return self.hash_buffer(rows.reshape(-1).data)

    def hash_buffer(self, pages: memoryview) -> Hashes:
        """The hashes of a buffer of whole pages. One C call for each page; the loop costs less than a tenth of it."""
        digest, seed = xxhash.xxh3_128_digest, self._seed
        joined = b"".join([digest(pages[start : start + PAGE_SIZE], seed) for start in range(0, len(pages), PAGE_SIZE)])
        hashes: Hashes = np.frombuffer(joined, dtype=_LANE).reshape(-1, 2)
        return hashes

    def is_zero(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Which of the hashes are those of a page of zeros, shape (n,)."""
        return same(hashes, self._zero)


def same(one: Hashes, other: Hashes) -> npt.NDArray[np.bool_]:
    """Which rows are equal. Shapes (n, 2) and (n, 2) or (2,)."""
    equal: npt.NDArray[np.bool_] = (one[:, 0] == other[..., 0]) & (one[:, 1] == other[..., 1])
    return equal
