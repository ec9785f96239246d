"""The undo of an epoch: the pages that it overwrites, as they were, in frames like any others.

PAGES frames in the order of the epoch's own, then a COMMIT with digest and chain of the image before it. All carry
the number of the epoch that they lead back to. Pages that an epoch names twice are in its undo twice, both times as
they were before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ckptd.memory.batch import RAW, ZERO
from ckptd.memory.hashing import Hashes, Rows, same
from ckptd.protocol.messages import Commit, encode
from ckptd.protocol.pages import encode_pages
from ckptd.protocol.wire import Type, pack_frame
from ckptd.replica.image import gather
from ckptd.replica.segment import EpochRecord, Segment
from ckptd.units import PAGE_SIZE

__all__ = ["undo_bytes", "write_undo"]

_PAGE_META, _FRAME_META = 32, 256  # bytes, generously: hash and gfn of a page; header and fixed part of a frame


def undo_bytes(record: EpochRecord) -> int:
    """At most so many bytes hold the undo of an epoch."""
    return sum(len(pages.gfns) * (PAGE_SIZE + _PAGE_META) + _FRAME_META for pages, _ in record.pages) + _FRAME_META


def write_undo(
    segment: Segment, record: EpochRecord, rows: Sequence[Rows], hashes: Sequence[Hashes], zero: Hashes,
    chain: bytes, digest: bytes,
) -> None:  # fmt: skip
    """Write the undo of `record` into an empty segment. `rows`, `hashes`, `chain` and `digest` are those before it.

    Raises NoSpace before anything but the segment has changed.
    """
    epoch, sequence = record.epoch - 1, 0
    segment.ensure(undo_bytes(record))
    for pages, _ in record.pages:
        gfns, old = pages.gfns, hashes[pages.region][pages.gfns]
        kinds = np.where(same(old, zero), np.uint8(ZERO), np.uint8(RAW))
        meta = encode_pages(pages.region, gfns, old, 0, kinds, zero)
        raw = gfns[kinds == RAW]
        head = pack_frame(Type.PAGES, meta, len(raw) * PAGE_SIZE, term=record.term, epoch=epoch, sequence=sequence)
        out = segment.place(head, len(raw) * PAGE_SIZE)
        if len(raw):
            gather(rows[pages.region], raw, out)
        sequence += 1
    commit = encode(Commit(record.page_count, digest, chain, "memory", False))
    segment.append(pack_frame(Type.COMMIT, commit, 0, term=record.term, epoch=epoch, sequence=sequence))
