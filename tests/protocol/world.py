"""A primary and a secondary machine on a bench, with an image in memory between them; no socket, no clock."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ckptd.memory.batch import DELTA, RAW, ZERO, Kinds
from ckptd.memory.digest import HashTable
from ckptd.memory.dirtyset import DirtySet
from ckptd.memory.hashing import PageHasher, Rows
from ckptd.memory.regions import Geometry
from ckptd.protocol.messages import Hello
from ckptd.protocol.peer import Buffers, Event, Timing
from ckptd.protocol.primary import PrimaryMachine
from ckptd.protocol.secondary import EpochReady, HelloReceived, SecondaryMachine
from ckptd.protocol.wire import HEADER_SIZE, Buffer, Header, Type, unpack_header
from ckptd.units import PAGE_SIZE

TIMING = Timing(heartbeat=500_000_000, timeout=2_000_000_000)
SEED = 0x5EED
RUN = bytes(range(16))


class MemoryHolding:
    """A replica in memory: what the receiving machine needs of one, and nothing else."""

    def __init__(self, geometry: Geometry, seed: int = SEED, holding: str = "partial") -> None:
        self.holding, self.epoch, self.term, self.seed, self.chain = holding, 0, 0, seed, bytes(16)
        self.images: list[Rows] = [np.zeros((region.pages, PAGE_SIZE), dtype=np.uint8) for region in geometry]
        self.table: HashTable | None = HashTable(geometry, PageHasher(seed))
        self.staged = bytearray()
        self.segments: list[bytes] = []
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
        self._settle()
        self.segments.append(bytes(self.staged))
        self.staged.clear()
        self.holding, self.epoch, self.term, self.chain = "committed", ready.epoch, ready.term, ready.chain
        hasher = self.table.hasher
        for header, meta, payload in frames(self.segments[-1]):
            if header.type is Type.PAGES:
                from ckptd.protocol.pages import decode_pages

                pages = decode_pages(header, meta, self.table.geometry, hasher)
                image = self.images[pages.region]
                image[pages.gfns[pages.kinds == RAW]] = np.frombuffer(payload, np.uint8).reshape(-1, PAGE_SIZE)
                image[pages.gfns[pages.kinds == ZERO]] = 0

    def _settle(self) -> None:
        if self._area is not None:
            self.staged += self._area
            self._area = None


def frames(data: bytes) -> Iterator[tuple[Header, bytes, bytes]]:
    at = 0
    while at < len(data):
        header = unpack_header(data[at : at + HEADER_SIZE])
        meta = data[at + HEADER_SIZE : at + HEADER_SIZE + header.meta_length]
        yield header, meta, data[at + HEADER_SIZE + header.meta_length : at + header.frame_length]
        at += header.frame_length


def feed(machine: PrimaryMachine | SecondaryMachine, data: Buffer | Buffers, step: int = 1 << 30) -> None:
    """Hand bytes to a machine as a socket would, at most `step` at a time; the caller asks for events."""
    joined = b"".join(data) if isinstance(data, list) else bytes(data)
    at = 0
    while at < len(joined):
        area = machine.buffer()
        count = min(len(area), len(joined) - at, step)
        area[:count] = joined[at : at + count]
        machine.received(count, 0)
        at += count
        yield_events = machine.next_event()
        if yield_events is not None:
            PENDING.setdefault(id(machine), []).append(yield_events)


PENDING: dict[int, list[Event]] = {}


def events(machine: PrimaryMachine | SecondaryMachine) -> list[Event]:
    """Everything that the machine has to say now."""
    found = PENDING.pop(id(machine), [])
    while (event := machine.next_event()) is not None:
        found.append(event)
    return found


class World:
    """Both machines, connected by lists, past their handshake unless told otherwise."""

    def __init__(self, geometry: Geometry, *, holding: MemoryHolding | None = None, greet: bool = True) -> None:
        self.geometry = geometry
        self.hasher = PageHasher(SEED)
        self.holding = holding or MemoryHolding(geometry)
        self.memory = [np.zeros((region.pages, PAGE_SIZE), dtype=np.uint8) for region in geometry]
        self.table = HashTable(geometry, self.hasher)
        self.primary = PrimaryMachine(geometry, TIMING, 0)
        self.secondary = SecondaryMachine(TIMING, 0)
        self.sent: list[bytes] = []
        if greet:
            self.greet()

    def greet(self, term: int = 1) -> None:
        self.to_secondary(self.primary.hello("vm", "sim", RUN, SEED, term, "memory", False))
        (hello,) = events(self.secondary)
        assert isinstance(hello, HelloReceived) and isinstance(hello.hello, Hello)
        self.to_primary(self.secondary.welcome(self.holding))
        events(self.primary)
        self.primary.begin(self.hasher.zero)

    def to_secondary(self, buffers: Buffers, step: int = 1 << 30) -> None:
        self.sent.append(b"".join(buffers))
        feed(self.secondary, buffers, step)

    def to_primary(self, buffers: Buffers) -> None:
        feed(self.primary, buffers)

    def pages(self, region: int, gfns: Iterable[int], iteration: int = 0) -> Buffers:
        """The frame that carries these pages as they are now; the sender's table follows."""
        where = np.fromiter(gfns, dtype=np.int64)
        rows = self.memory[region][where]
        hashes = self.hasher.hash_rows(rows)
        zero = self.hasher.is_zero(hashes)
        kinds: Kinds = np.where(zero, np.uint8(ZERO), np.uint8(RAW))
        self.table.update(region, where, hashes)
        return self.primary.pages(region, where, hashes, kinds, iteration, [rows[~zero].tobytes()])

    def close_epoch(self, state: bytes = b"state", held: bytes = b"held", final: bool = False) -> list[Buffers]:
        return [
            self.primary.save_state(state),
            self.primary.output(held, 0, 1),
            self.primary.commit(self.table.digest, "memory", final=final),
        ]

    def epoch(self, dirty: Sequence[tuple[int, Iterable[int]]] = (), step: int = 1 << 30) -> EpochReady:
        """One whole epoch, acknowledged and applied."""
        parts = [self.pages(region, gfns) for region, gfns in dirty]
        for part in itertools.chain(parts, self.close_epoch()):
            self.to_secondary(part, step)
        (ready,) = events(self.secondary)
        assert isinstance(ready, EpochReady)
        self.settle(ready)
        return ready

    def settle(self, ready: EpochReady) -> None:
        self.holding.commit(ready)
        self.to_primary(self.secondary.acknowledge("memory"))
        events(self.primary)


__all__ = ["DELTA", "MemoryHolding", "World", "DirtySet", "events", "feed", "frames"]
