"""Page batches: how the pages of one frame are encoded, and the cache of last sent pages that the delta encoding needs.

Each page of a batch travels in one of three ways, and its hash says what it must be once decoded:

    zero      no bytes: its hash is the hash of a page of zeros
    raw       4,096 bytes
    delta     its xor against the receiver's copy, lz4-compressed together with the other deltas of the batch

The receiver's copy is the page as of the last committed epoch; a delta is sent only where the sender knows its own last
sent copy to be just that (same hash). Source of delta compression in migration: QEMU docs/devel/migration, XBZRLE.
"""

from __future__ import annotations

from dataclasses import dataclass

import lz4.block
import numpy as np
import numpy.typing as npt

from ckptd.errors import CorruptFrame
from ckptd.memory.dirtyset import Gfns
from ckptd.memory.hashing import Hashes, Rows, same
from ckptd.units import PAGE_SIZE

__all__ = ["DELTA", "RAW", "ZERO", "DeltaCache", "Kinds", "compress_delta", "expand_delta"]

ZERO, RAW, DELTA = 0, 1, 2
Kinds = npt.NDArray[np.uint8]

_WORTH = 0.75  # a delta block must be smaller than this part of its raw size, or the pages go raw


@dataclass(frozen=True, slots=True)
class Delta:
    """The pages of a batch that pay as deltas: their positions in it, and one compressed block."""

    chosen: npt.NDArray[np.int64]
    block: bytes


class DeltaCache:
    """The last sent copies of recently sent pages, direct-mapped: a page has one slot, the newest page in it wins.

    `size_bytes` bounds it; lookups and stores are numpy batches.
    """

    __slots__ = ("_hashes", "_pages", "_places", "_slots")

    def __init__(self, size_bytes: int) -> None:
        self._slots = max(1, size_bytes // PAGE_SIZE)
        self._pages = np.zeros((self._slots, PAGE_SIZE), dtype=np.uint8)
        self._hashes = np.zeros((self._slots, 2), dtype=np.uint64)
        self._places = np.full(self._slots, -1, dtype=np.int64)

    def encode(self, region: int, gfns: Gfns, rows: Rows, held: Hashes) -> Delta | None:
        """The deltas worth sending for these pages, of which the receiver holds `held`; None where none pay."""
        slots = self._slot(region, gfns)
        known = (self._places[slots] == self._place(region, gfns)) & same(self._hashes[slots], held)
        chosen = np.flatnonzero(known)
        if not len(chosen):
            return None
        delta = np.bitwise_xor(rows[chosen], self._pages[slots[chosen]])
        block = compress_delta(delta)
        return Delta(chosen, block) if len(block) < _WORTH * delta.nbytes else None

    def remember(self, region: int, gfns: Gfns, rows: Rows, hashes: Hashes) -> None:
        """These pages were sent with this content."""
        slots = self._slot(region, gfns)
        self._pages[slots] = rows
        self._hashes[slots] = hashes
        self._places[slots] = self._place(region, gfns)

    def clear(self) -> None:
        """Forget everything: the receiver's copies are no longer known."""
        self._places.fill(-1)

    def _place(self, region: int, gfns: Gfns) -> Gfns:
        return gfns | (region << 32)

    def _slot(self, region: int, gfns: Gfns) -> Gfns:
        return (gfns + region * 7919) % self._slots


def compress_delta(delta: Rows) -> bytes:
    """One lz4 block (no size prefix) of concatenated page deltas."""
    return lz4.block.compress(delta, store_size=False)  # type: ignore[no-any-return]


def expand_delta(block: memoryview, pages: int) -> Rows:
    """The page deltas, shape (pages, 4096), of an lz4 block. Allocates `pages` pages at most. Raises CorruptFrame."""
    try:
        raw = lz4.block.decompress(block, uncompressed_size=pages * PAGE_SIZE)
    except lz4.block.LZ4BlockError as error:
        raise CorruptFrame("the compressed pages of a batch do not decompress", pages=pages) from error
    if len(raw) != pages * PAGE_SIZE:
        raise CorruptFrame(f"{pages} compressed pages decompressed to {len(raw)} bytes")
    return np.frombuffer(raw, dtype=np.uint8).reshape(-1, PAGE_SIZE)
