"""Replay: a recording through the same receiving machine that once took its epochs in, into memory, each epoch proved.

The first two frames of a recording say whose guest it is and what came before; all others go to the machine as from a
link.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from crc32c import crc32c

from ckptd.errors import CkptdError, JournalError
from ckptd.memory.batch import RAW, ZERO
from ckptd.memory.digest import HashTable
from ckptd.memory.hashing import PageHasher, Rows
from ckptd.memory.regions import Geometry, Region
from ckptd.protocol.messages import Hello, Message, Welcome, decode
from ckptd.protocol.pages import decode_pages
from ckptd.protocol.peer import Timing
from ckptd.protocol.secondary import EpochReady, SecondaryMachine
from ckptd.protocol.wire import HEADER_SIZE, MAX_META, Buffer, Header, Type, unpack_header
from ckptd.replica.files import saying
from ckptd.replica.segment import rows_of
from ckptd.units import PAGE_SIZE

__all__ = ["MemoryReplica", "ReplayedEpoch", "replay"]

_NO_LIMIT = Timing(1 << 62, 1 << 62)


@dataclass(frozen=True, slots=True)
class ReplayedEpoch:
    """One epoch of a recording. `ok`: the machine came to the digest that its COMMIT states; `reason`: why not."""

    epoch: int
    term: int
    digest: bytes
    ok: bool
    reason: str = ""


class MemoryReplica:
    """A replica in plain memory, for a machine that replays: no file, no history, nothing outlives the process."""

    def __init__(self, geometry: Geometry, seed: int, epoch: int, chain: bytes, term: int) -> None:
        self.holding = "partial"
        self.epoch, self.chain, self.term, self.seed = epoch, chain, term, seed
        self.geometry = geometry
        self.table = HashTable(geometry, PageHasher(seed))
        self.images: list[Rows] = [np.zeros((region.pages, PAGE_SIZE), dtype=np.uint8) for region in geometry]
        self._staged: list[tuple[Header, bytes, memoryview]] = []

    def place(self, header: Header, meta: bytes) -> memoryview:
        self._staged.append((header, meta, memoryview(bytearray(header.payload_length))))
        return self._staged[-1][2]

    def append(self, *buffers: Buffer) -> None:
        whole = memoryview(b"".join(buffers))
        header = unpack_header(whole[:HEADER_SIZE])
        begin = HEADER_SIZE + header.meta_length
        self._staged.append((header, bytes(whole[HEADER_SIZE:begin]), whole[begin:]))

    def drop_staged(self) -> None:
        self._staged = []

    def commit(self, event: EpochReady) -> None:
        """Apply what is staged."""
        for header, meta, payload in self._staged:
            if header.type is Type.PAGES:
                pages = decode_pages(header, meta, self.geometry, self.table.hasher)
                self.images[pages.region][pages.gfns[pages.kinds == RAW]] = rows_of(payload)
                self.images[pages.region][pages.gfns[pages.kinds == ZERO]] = 0
        self._staged = []
        self.holding, self.epoch, self.term, self.chain = "committed", event.epoch, event.term, event.chain


def replay(path: Path) -> Iterator[ReplayedEpoch]:
    """Feed a recording to the receiving machine; one result for each epoch, ending with the first that is not ok.

    The last epoch is ok only if the bytes of the whole image, hashed again, have its digest. Raises JournalError if the
    beginning of the file is no recording.
    """
    with saying("read the recording", path), path.open("rb", buffering=0) as file:
        hello, _ = _control(file, path, Type.HELLO)
        welcome, header = _control(file, path, Type.WELCOME)
        assert isinstance(hello, Hello) and isinstance(welcome, Welcome)
        geometry = Geometry(tuple(Region(name, pages) for name, pages in hello.regions))
        holding = MemoryReplica(geometry, hello.seed, welcome.epoch, welcome.chain, header.term)
        last: ReplayedEpoch | None = None
        try:
            for event in _fed(file, holding):
                if last is not None:
                    yield last
                last = ReplayedEpoch(event.epoch, event.term, event.digest, True)
        except CkptdError as error:
            if last is not None:
                yield last
            yield ReplayedEpoch(holding.epoch + 1, holding.term, bytes(16), False, str(error))
            return
    if last is not None:
        again = HashTable(geometry, holding.table.hasher)
        again.rehash(holding.images)
        ok = again.digest == last.digest
        reason = "" if ok else f"the bytes of the image have digest {again.digest.hex()}"
        yield ReplayedEpoch(last.epoch, last.term, last.digest, ok, reason)


def _fed(file: BinaryIO, holding: MemoryReplica) -> Iterator[EpochReady]:
    machine = SecondaryMachine(_NO_LIMIT, 0, replaying=True)
    machine.replay(holding)
    while count := file.readinto(machine.buffer()):  # type: ignore[attr-defined]
        machine.received(count, 0)
        while (event := machine.next_event()) is not None:
            if isinstance(event, EpochReady):
                holding.commit(event)
                machine.acknowledge(event.level)
                machine.replay(holding)  # after a final epoch, too, the next one may follow
                yield event
    machine.end_of_stream()


def _control(file: BinaryIO, path: Path, kind: Type) -> tuple[Message, Header]:
    """The next frame, which must be of this type."""
    try:
        header = unpack_header(file.read(HEADER_SIZE).ljust(HEADER_SIZE, b"\0"))
        meta = file.read(min(header.meta_length, MAX_META))
        if header.type is not kind or crc32c(meta) != header.meta_crc:
            raise JournalError(f"a {header.type.name} frame, or a damaged one, where {kind.name} is due")
        return decode(kind, meta), header
    except CkptdError as error:
        raise JournalError(f"this is no recording: {error.message}", file=path) from error
