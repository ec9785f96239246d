"""Recordings: the retained history of a replica as one file of frames that the receiving machine can be fed.

    HELLO      whose guest it is: name, kind, run, regions, seed
    WELCOME    holding "empty", the epoch and the chain before the first one recorded
    PAGES...   the whole image as of the first epoch, pages of zeros left out
    STATE OUTPUT COMMIT      of the first epoch; the COMMIT counts the pages above, all else in it is as it was
    the segments of all later epochs, byte for byte

Made beside a running daemon like a restore, from which it takes the first image.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ckptd import __version__
from ckptd.errors import CkptdError, JournalError, StateError
from ckptd.memory.batch import RAW
from ckptd.memory.hashing import PageHasher
from ckptd.protocol.messages import Hello, Output, State, Welcome, encode
from ckptd.protocol.pages import encode_pages
from ckptd.protocol.reader import Frame, FrameReader
from ckptd.protocol.wire import MAX_BATCH_PAGES, OLDEST_VERSION, VERSION, Buffer, Header, Type, pack_frame
from ckptd.replica.files import saying
from ckptd.replica.history import opened, restore_image
from ckptd.replica.image import Image
from ckptd.replica.replica import Replica
from ckptd.replica.segment import EpochRecord, read_epoch

__all__ = ["Recorded", "export", "read_frames"]


@dataclass(frozen=True, slots=True)
class Recorded:
    """What an export wrote."""

    first: int
    last: int
    bytes: int
    path: Path

    def as_dict(self) -> dict[str, object]:
        return {"first": self.first, "last": self.last, "bytes": self.bytes, "path": str(self.path)}


def export(source: Replica | Path, path: Path) -> Recorded:
    """Write all that history retains to one new file. May run in a thread beside commits and applies.

    Needs as much free space again as the guest has memory, beside `path`. Raises as `restore` does.
    """
    with opened(source) as replica:
        if path.exists():
            raise StateError("the file to record into exists already", file=path)
        entries = replica.history()
        if not entries:
            raise StateError(f"the replica is {replica.holding}: it has no committed epoch to record")
        new, work = path.with_name(path.name + ".new"), path.with_name(path.name + ".image")
        try:
            with saying("write the recording", path):
                work.mkdir(mode=0o700)
                with new.open("xb") as file:
                    last = _write(replica, entries[0].epoch, work, file.write)
                    file.flush()
                    os.fdatasync(file.fileno())
                os.rename(new, path)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            new.unlink(missing_ok=True)
    return Recorded(entries[0].epoch, last, path.stat().st_size, path)


def read_frames(path: Path) -> Iterator[Frame]:
    """The frames of a recording, headers and metas checked. Raises JournalError with the offset of the damage."""
    payload = memoryview(b"")

    def place(header: Header, meta: bytes) -> memoryview:
        nonlocal payload
        if len(payload) < header.payload_length:
            payload = memoryview(bytearray(header.payload_length))
        return payload[: header.payload_length]

    reader, offset = FrameReader(place, check_sequence=False), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(reader.buffer()):
            reader.received(count)
            try:
                while frame := reader.next_frame():
                    yield frame
                    offset += frame.header.frame_length
            except JournalError:
                raise
            except CkptdError as error:
                raise JournalError(f"the recording is damaged: {error.message}", file=path, offset=offset) from error
    if reader.in_frame:
        raise JournalError("the recording ends within a frame", file=path, offset=offset)


def _write(replica: Replica, first: int, work: Path, write: Callable[[Buffer], object]) -> int:
    """All frames; returns the last epoch."""
    with replica.pinned(first) as journal:
        image, record = restore_image(replica, first, work)
        try:
            for buffer in _beginning(replica, record, image):
                write(buffer)
        finally:
            image.close()
        last = replica.applied()
        geometry, hasher = image.geometry, _hasher(replica)
        for epoch in range(first + 1, last + 1):
            if epoch not in journal.segments:
                raise JournalError("the segment is missing", epoch=epoch)
            view = journal.segments[epoch].view
            write(view[: read_epoch(view, epoch, geometry, hasher, check=True).used])
    return last


def _beginning(replica: Replica, record: EpochRecord, image: Image) -> Iterator[Buffer]:
    """HELLO, WELCOME, and the first epoch with the whole image as its pages."""
    geometry, hasher, epoch, term = image.geometry, _hasher(replica), record.epoch, record.term
    regions = [[region.name, region.pages] for region in geometry]
    software = f"ckptd {__version__}"
    commit = record.commit
    hello = Hello(
        OLDEST_VERSION, VERSION, software, replica.guest, replica.kind, replica.run, regions, replica.seed,
        commit.level, False,
    )  # fmt: skip
    chain = replica.chain_before(epoch)
    welcome = Welcome(VERSION, software, "empty", epoch - 1, replica.seed, bytes(16), chain)

    def frame(kind: Type, meta: bytes, payload: Buffer = b"", of: int = epoch) -> Iterator[Buffer]:
        yield pack_frame(kind, meta, len(payload), term=term, epoch=of, sequence=0)
        yield payload

    yield from frame(Type.HELLO, encode(hello), of=epoch - 1)
    yield from frame(Type.WELCOME, encode(welcome), of=epoch - 1)
    count = 0
    for index, rows in enumerate(image.rows):
        for start in range(0, len(rows), MAX_BATCH_PAGES):
            hashes = hasher.hash_rows(rows[start : start + MAX_BATCH_PAGES])
            written = np.flatnonzero(~hasher.is_zero(hashes))
            if len(written):
                kinds = np.full(len(written), RAW, dtype=np.uint8)
                meta = encode_pages(index, written + start, hashes[written], 0, kinds, hasher.zero)
                yield from frame(Type.PAGES, meta, rows[written + start].reshape(-1).data)
                count += len(written)
    yield from frame(Type.STATE, encode(State(record.state_crc)), record.state)
    yield from frame(Type.OUTPUT, encode(Output(record.output_crc, record.released, record.mark)), record.held)
    yield from frame(Type.COMMIT, encode(replace(commit, pages=count)))


def _hasher(replica: Replica) -> PageHasher:
    assert replica.table is not None
    return replica.table.hasher
