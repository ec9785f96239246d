"""The meta of a PAGES frame, and its payload.

    0        2       3     4         8             12            16             20        24
    +--------+-------+-----+---------+-------------+-------------+--------------+---------+
    | region | flags |  0  |  count  |  iteration  |  raw pages  | delta pages  |    0    |
    |  u16   |  u8   | u8  |   u32   |     u32     |     u32     |     u32      |   u32   |
    +--------+-------+-----+---------+-------------+-------------+--------------+---------+
    | gfns   u32[count], strictly ascending; only the first one if flags bit 0 (run) is set |
    | hashes 16 bytes[count]                                                                |
    | kinds  u8[count]: 0 zero, 1 raw, 2 delta; only if flags bit 1 is set                  |
    +---------------------------------------------------------------------------------------+

Payload: the raw pages in gfn order, then one lz4 block, smaller than its pages, that decompresses to the delta pages in
gfn order. Without kinds a page is zero if its hash is that of a page of zeros, and raw otherwise. `iteration` is 0 for
pages copied while the guest was paused and counts from 1 for precopy iterations, whose pages may be torn.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ckptd.errors import CorruptFrame
from ckptd.memory.batch import DELTA, RAW, ZERO, Kinds
from ckptd.memory.dirtyset import Gfns
from ckptd.memory.hashing import HASH_SIZE, Hashes, PageHasher, same
from ckptd.memory.regions import Geometry
from ckptd.protocol.wire import MAX_BATCH_PAGES, Buffer, Header
from ckptd.units import PAGE_SIZE

__all__ = ["Pages", "decode_pages", "encode_pages"]

_HEAD = struct.Struct("<HBBIIIII")
_RUN, _KINDS = 1, 2


@dataclass(frozen=True, slots=True)
class Pages:
    """Which pages a frame carries, what they must hash to, and how they travel."""

    region: int
    gfns: Gfns
    hashes: Hashes
    kinds: Kinds
    iteration: int
    run: bool

    @property
    def raw(self) -> int:
        return int(np.count_nonzero(self.kinds == RAW))

    @property
    def contiguous(self) -> bool:
        """Every page is raw and the gfns are one run: the payload is a slice of the region."""
        return self.run and bool((self.kinds == RAW).all())


def encode_pages(region: int, gfns: Gfns, hashes: Hashes, iteration: int, kinds: Kinds, zero: Hashes) -> bytes:
    """The meta for 1 to 4096 pages with ascending gfns; `zero` is the hash of a page of zeros."""
    count = len(gfns)
    run = count == int(gfns[-1]) - int(gfns[0]) + 1
    explicit = bool((kinds == DELTA).any())
    raw, delta = int(np.count_nonzero(kinds == RAW)), int(np.count_nonzero(kinds == DELTA)) if explicit else 0
    head = _HEAD.pack(region, run * _RUN | explicit * _KINDS, 0, count, iteration, raw, delta, 0)
    places = (gfns[:1] if run else gfns).astype("<u4").tobytes()
    return head + places + hashes.astype("<u8", copy=False).tobytes() + (kinds.tobytes() if explicit else b"")


def decode_pages(header: Header, meta: Buffer, geometry: Geometry, hasher: PageHasher) -> Pages:
    """The meta of a PAGES frame. Raises CorruptFrame naming region, gfn or field."""
    if len(meta) < _HEAD.size:
        raise CorruptFrame("the meta is too short", frame="PAGES", field="meta_length")
    region, flags, reserved, count, iteration, raw, delta, padding = _HEAD.unpack_from(meta)
    if region >= len(geometry):
        raise CorruptFrame(f"there are {len(geometry)} regions", frame="PAGES", region=region)
    name = geometry[region].name
    if flags & ~(_RUN | _KINDS) or reserved or padding:
        raise CorruptFrame("reserved bits are set", frame="PAGES", field="flags", region=name)
    if not 0 < count <= MAX_BATCH_PAGES:
        raise CorruptFrame(
            f"{count} pages in a frame; 1 to {MAX_BATCH_PAGES}", frame="PAGES", field="count", region=name
        )
    run, explicit = bool(flags & _RUN), bool(flags & _KINDS)
    if explicit and header.version < 2:
        raise CorruptFrame("protocol version 1 has no delta pages", frame="PAGES", field="flags", region=name)
    places = 1 if run else count
    if len(meta) != _HEAD.size + 4 * places + HASH_SIZE * count + count * explicit:
        raise CorruptFrame("the meta's length does not fit its count", frame="PAGES", field="count", region=name)
    gfns = np.frombuffer(meta, "<u4", places, _HEAD.size).astype(np.int64)
    if run:
        gfns = np.arange(gfns[0], gfns[0] + count, dtype=np.int64)
    elif not (np.diff(gfns) > 0).all():
        at = int(gfns[int(np.argmax(np.diff(gfns) <= 0)) + 1])
        raise CorruptFrame(
            "gfns must ascend: a page is named twice or out of order", frame="PAGES", region=name, gfn=at
        )
    if gfns[-1] >= geometry[region].pages:
        raise CorruptFrame(
            f"the region has {geometry[region].pages} pages", frame="PAGES", region=name, gfn=int(gfns[-1])
        )
    hashes = np.frombuffer(meta, "<u8", 2 * count, _HEAD.size + 4 * places).reshape(-1, 2).astype(np.uint64)
    zero = same(hashes, hasher.zero)
    kinds = np.frombuffer(meta, np.uint8, count, len(meta) - count).copy() if explicit else _implied(zero)
    if explicit and ((kinds > DELTA).any() or not np.array_equal(kinds == ZERO, zero)):
        raise CorruptFrame("the kinds of pages do not fit their hashes", frame="PAGES", field="kinds", region=name)
    pages = Pages(region, gfns, hashes, kinds, iteration, run)
    deltas = int(np.count_nonzero(kinds == DELTA))
    if pages.raw != raw or deltas != delta:
        raise CorruptFrame("raw and delta pages are miscounted", frame="PAGES", field="raw", region=name)
    block = header.payload_length - raw * PAGE_SIZE
    if block < 0 or (block > 0) != (deltas > 0) or block > deltas * PAGE_SIZE:
        raise CorruptFrame(
            f"{header.payload_length} bytes do not hold {raw} raw and {deltas} delta pages",
            frame="PAGES", field="payload_length", region=name,
        )  # fmt: skip
    if iteration and deltas:
        raise CorruptFrame("delta pages in a precopy iteration", frame="PAGES", field="kinds", region=name)
    return pages


def _implied(zero: npt.NDArray[np.bool_]) -> Kinds:
    return np.where(zero, np.uint8(ZERO), np.uint8(RAW))
