"""A primary and a secondary machine on a bench, with an image in memory between them; no socket, no clock."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from crc32c import crc32c

from ckptd.errors import NoSpace
from ckptd.memory.batch import DELTA, RAW, ZERO, DeltaCache, Kinds
from ckptd.memory.digest import HashTable
from ckptd.memory.dirtyset import Gfns
from ckptd.memory.hashing import PageHasher, Rows
from ckptd.memory.regions import Geometry
from ckptd.protocol.messages import Message, encode
from ckptd.protocol.pages import decode_pages
from ckptd.protocol.peer import Buffers, Event, Peer, Timing
from ckptd.protocol.primary import Acknowledged, PrimaryMachine, TablePart, Welcomed
from ckptd.protocol.secondary import EpochReady, HelloReceived, SecondaryMachine, TableWanted
from ckptd.protocol.wire import HEADER_SIZE, Buffer, Header, Type, unpack_header
from ckptd.units import PAGE_SIZE

__all__ = ["RUN", "SEED", "TIMING", "Frame", "MemoryHolding", "Side", "World", "frames", "message_frame"]

TIMING = Timing(heartbeat=500_000_000, timeout=2_000_000_000)
SEED = 0x5EED
RUN = bytes(range(16))


@dataclass(frozen=True)
class Frame:
    """One frame in pieces, to be changed and packed again."""

    header: Header
    meta: bytes
    payload: bytes

    def pack(self, **changes: Any) -> bytes:
        """Its bytes; `changes` are header fields, meta and payload. Lengths and checksums follow unless given."""
        meta, payload = changes.pop("meta", self.meta), changes.pop("payload", self.payload)
        fitting = {"meta_length": len(meta), "payload_length": len(payload), "meta_crc": crc32c(meta)}
        return dataclasses.replace(self.header, **{**fitting, **changes}).pack() + meta + payload


def message_frame(message: Message, payload: bytes = b"", **fields: Any) -> bytes:
    """A frame of our own making; fields of the header default to term 1, epoch 0, sequence 0."""
    header = Header(message.TYPE, 1, 0, 0, 0, 0, 0)
    return Frame(header, encode(message), payload).pack(**fields)


def frames(data: Buffer) -> Iterator[Frame]:
    """The frames of a stream that is known to be right."""
    data, at = bytes(data), 0
    while at < len(data):
        header = unpack_header(data[at : at + HEADER_SIZE])
        meta_end = at + HEADER_SIZE + header.meta_length
        yield Frame(header, data[at + HEADER_SIZE : meta_end], data[meta_end : at + header.frame_length])
        at += header.frame_length


class MemoryHolding:
    """A replica in memory: what the receiving machine needs of one, and nothing else."""

    def __init__(self, geometry: Geometry, seed: int = SEED, holding: str = "partial") -> None:
        self.holding, self.epoch, self.term, self.seed, self.chain = holding, 0, 0, seed, bytes(16)
        self.images: list[Rows] = [np.zeros((region.pages, PAGE_SIZE), dtype=np.uint8) for region in geometry]
        self.table: HashTable | None = HashTable(geometry, PageHasher(seed))
        self.staged = bytearray()
        self.segments: list[bytes] = []
        self.full = False  # the next commit fails
        self._area: memoryview | None = None

    def place(self, header: Header, meta: bytes) -> memoryview:
        self._settle()
        self.staged += header.pack() + meta
        self._area = memoryview(bytearray(header.payload_length))
        return self._area

    def append(self, *buffers: Buffer) -> None:
        self._settle()
        for buffer in buffers:
            self.staged += buffer

    def drop_staged(self) -> None:
        self._area = None
        self.staged.clear()

    def commit(self, ready: EpochReady) -> None:
        """Permanent and applied."""
        if self.full:
            raise NoSpace("the bench is full", epoch=ready.epoch)
        self._settle()
        self.segments.append(bytes(self.staged))
        self.staged.clear()
        self.holding, self.epoch, self.term, self.chain = "committed", ready.epoch, ready.term, ready.chain
        if ready.direct:
            return
        assert self.table is not None
        for frame in frames(self.segments[-1]):
            if frame.header.type is Type.PAGES:
                pages = decode_pages(frame.header, frame.meta, self.table.geometry, self.table.hasher)
                image = self.images[pages.region]
                image[pages.gfns[pages.kinds == RAW]] = np.frombuffer(frame.payload, np.uint8).reshape(-1, PAGE_SIZE)
                image[pages.gfns[pages.kinds == ZERO]] = 0

    def state(self) -> tuple[object, ...]:
        """All that a refused epoch must leave as it was."""
        assert self.table is not None
        lanes = [self.table.region(index).tobytes() for index in range(len(self.images))]
        return self.holding, self.epoch, self.chain, self.table.digest, lanes, [one.tobytes() for one in self.images]

    def true_digest(self) -> bytes:
        """The digest of the image, from its bytes."""
        assert self.table is not None
        fresh = HashTable(self.table.geometry, self.table.hasher)
        fresh.rehash(self.images)
        return fresh.digest

    def _settle(self) -> None:
        if self._area is not None:
            self.staged += self._area
            self._area = None


class Side:
    """A machine and its end of a socket: bytes that it does not read yet wait, what it says is kept until taken."""

    def __init__(self, machine: Peer) -> None:
        self.machine = machine
        self._waiting = b""
        self._said: list[Event] = []

    def deliver(self, data: Buffer | Buffers, step: int = 1 << 30, now: int = 0) -> None:
        """Hand over bytes, at most `step` at a time."""
        self._waiting += b"".join(data) if isinstance(data, list) else bytes(data)
        self._listen()
        while self._waiting and self.machine.state not in self.machine.BUSY:
            area = self.machine.buffer()
            count = min(len(area), len(self._waiting), step)
            area[:count] = self._waiting[:count]
            self._waiting = self._waiting[count:]
            self.machine.received(count, now)
            self._listen()

    def events(self) -> list[Event]:
        """Everything that the machine has said since the last call."""
        self.deliver(b"")
        said, self._said = self._said, []
        return said

    def _listen(self) -> None:
        while (event := self.machine.next_event()) is not None:
            self._said.append(event)


class World:
    """Both machines, connected by lists, past their handshake unless told otherwise."""

    def __init__(self, geometry: Geometry, *, holding: MemoryHolding | None = None, greet: bool = True) -> None:
        self.geometry = geometry
        self.hasher = PageHasher(SEED)
        self.holding = holding or MemoryHolding(geometry)
        self.memory = [np.zeros((region.pages, PAGE_SIZE), dtype=np.uint8) for region in geometry]
        self.table = HashTable(geometry, self.hasher)
        self.cache = DeltaCache(1 << 20)
        self.term = 1
        self.connect()
        if greet:
            self.greet()

    # --- connections

    def connect(self) -> None:
        """Two new machines that have not spoken."""
        self.primary = PrimaryMachine(self.geometry, TIMING, 0)
        self.secondary = SecondaryMachine(TIMING, 0)
        self.there, self.here = Side(self.secondary), Side(self.primary)
        self.sent: list[bytes] = []

    def hello(self) -> bytes:
        return b"".join(self.primary.hello("vm", "sim", RUN, SEED, self.term, "memory", False))

    def greet(self) -> None:
        self.to_secondary(self.hello())
        (hello,) = self.there.events()
        assert isinstance(hello, HelloReceived)
        self.here.deliver(self.secondary.welcome(self.holding))
        (welcomed,) = self.here.events()
        assert isinstance(welcomed, Welcomed)
        self.primary.begin(self.hasher.zero)

    def reconnect(self) -> None:
        """After any failure: new machines over the same replica, and the table that the secondary states."""
        self.secondary.abandon()
        self.connect()
        self.greet()
        self.to_secondary(self.primary.request_table())
        assert self.there.events() == [TableWanted()]
        self.cache.clear()
        for frame in self.secondary.table_frames():
            self.here.deliver(frame)
        for part in self.here.events():
            assert isinstance(part, TablePart)
            gfns = np.arange(part.first, part.first + len(part.hashes), dtype=np.int64)
            self.table.update(part.region, gfns, part.hashes)

    def goes_on(self) -> None:
        """A fresh connection brings the replica up to date, whatever happened on the last one."""
        self.reconnect()
        dirty = self.table.copy().rehash(self.memory)
        self.epoch([(region, gfns) for region, gfns in enumerate(dirty.gfns) if len(gfns)])
        assert self.holding.state()[-1] == [one.tobytes() for one in self.memory]
        assert self.holding.true_digest() == self.table.digest

    # --- frames

    def to_secondary(self, data: Buffer | Buffers, step: int = 1 << 30) -> None:
        joined = b"".join(data) if isinstance(data, list) else bytes(data)
        self.sent.append(joined)
        self.there.deliver(joined, step)

    def write(self, region: int, gfns: Sequence[int], value: int) -> None:
        """The guest writes: each page gets content of its own; value 0 makes zeros."""
        for gfn in gfns:
            self.memory[region][gfn] = 0
            if value:
                self.memory[region][gfn, : 8 + value % 8] = (value + gfn) % 255 + 1

    def pages(self, region: int, gfns: Iterable[int], iteration: int = 0, *, torn: Sequence[int] = ()) -> bytes:
        """The frame that carries these pages as they are now; the sender's table follows. `torn`: sent amiss."""
        where, rows, hashes, kinds = self._gathered(region, gfns)
        self.table.update(region, where, hashes)
        if not iteration:
            self.cache.remember(region, where, rows, hashes)
        for gfn in torn:
            rows[where == gfn, -1] ^= 0xFF
        payload = rows[kinds == RAW].tobytes()
        return b"".join(self.primary.pages(region, where, hashes, kinds, iteration, [payload]))

    def deltas(self, region: int, gfns: Iterable[int]) -> bytes:
        """The same for pages of the paused guest, as deltas where they pay."""
        where, rows, hashes, kinds = self._gathered(region, gfns)
        held = self.table.update(region, where, hashes)
        sent = np.flatnonzero(kinds)
        delta = self.cache.encode(region, where[sent], rows[sent], held[sent])
        self.cache.remember(region, where, rows, hashes)
        block = b""
        if delta is not None:
            kinds[sent[delta.chosen]] = DELTA
            block = delta.block
        return b"".join(self.primary.pages(region, where, hashes, kinds, 0, [rows[kinds == RAW].tobytes(), block]))

    def _gathered(self, region: int, gfns: Iterable[int]) -> tuple[Gfns, Rows, Any, Kinds]:
        where = np.fromiter(gfns, dtype=np.int64)
        rows = self.memory[region][where]
        hashes = self.hasher.hash_rows(rows)
        kinds: Kinds = np.where(self.hasher.is_zero(hashes), np.uint8(ZERO), np.uint8(RAW))
        return where, rows, hashes, kinds

    def close_epoch(self, state: bytes = b"state", held: bytes = b"held", final: bool = False) -> list[bytes]:
        """STATE, OUTPUT and COMMIT."""
        return [
            b"".join(self.primary.save_state(state)),
            b"".join(self.primary.output(held, 0, 1)),
            b"".join(self.primary.commit(self.table.digest, "memory", final=final)),
        ]

    def epoch(self, dirty: Sequence[tuple[int, Iterable[int]]] = (), step: int = 1 << 30) -> EpochReady:
        """One whole epoch, acknowledged and applied."""
        parts = [self.pages(region, gfns) for region, gfns in dirty]
        for part in itertools.chain(parts, self.close_epoch()):
            self.to_secondary(part, step)
        return self.settle()

    def settle(self) -> EpochReady:
        """The secondary has an epoch ready: make it permanent, acknowledge."""
        (ready,) = self.there.events()
        assert isinstance(ready, EpochReady)
        self.holding.commit(ready)
        self.here.deliver(self.secondary.acknowledge(ready.level))
        assert self.here.events() == [Acknowledged(ready.epoch, ready.level)]
        return ready
