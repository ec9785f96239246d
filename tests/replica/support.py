"""A stand-in for the receiving machine: it stages epochs as the machine does, and remembers every memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from crc32c import crc32c

from ckptd.memory.batch import RAW, ZERO
from ckptd.memory.digest import HashTable
from ckptd.memory.dirtyset import Gfns
from ckptd.memory.hashing import PageHasher, Rows, same
from ckptd.memory.regions import Geometry
from ckptd.protocol.chain import CHAIN_START, next_chain
from ckptd.protocol.messages import Commit, Iteration, Output, State, encode
from ckptd.protocol.pages import encode_pages
from ckptd.protocol.wire import Header, Type, unpack_header
from ckptd.protocol.wire import pack_frame as pack
from ckptd.replica.replica import Replica
from ckptd.units import PAGE_SIZE

GEOMETRY = Geometry.of(ram=96, rom=16)
SEED = 77
RUN = bytes(range(16))


def open_replica(directory: Path, **changed: int) -> Replica:
    settings = {"history": 8, "history_bytes": 256 << 20, "reserve": 1 << 20} | changed
    return Replica.open(directory, guest="vm", **settings)


@dataclass
class Guest:
    """Deterministic: epoch n of two guests with one seed is the same."""

    geometry: Geometry = GEOMETRY
    seed: int = 1
    epoch: int = 0
    chain: bytes = CHAIN_START
    term: int = 1
    memories: dict[int, list[Rows]] = field(default_factory=dict)
    digests: dict[int, bytes] = field(default_factory=dict)
    chains: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.memory = [np.zeros((region.pages, PAGE_SIZE), dtype=np.uint8) for region in self.geometry]
        self.table = HashTable(self.geometry, PageHasher(SEED))

    def run(self, most: int = 24) -> list[Gfns]:
        """Write some pages, some of them with zeros; returns the gfns of each region."""
        rng = np.random.default_rng((self.seed, self.epoch + 1))
        written = []
        for region, rows in enumerate(self.memory):
            count = int(rng.integers(0, min(most, len(rows)))) if region else int(rng.integers(1, min(most, len(rows))))
            gfns = np.sort(rng.choice(len(rows), count, replace=False)).astype(np.int64)
            if self.epoch % 3 == 2:  # a run
                gfns = np.arange(count, dtype=np.int64)
            rows[gfns] = rng.integers(1, 255, (count, PAGE_SIZE), dtype=np.uint8)
            rows[gfns[rng.random(count) < 0.2]] = 0
            written.append(gfns)
        return written

    def stage(
        self, replica: Replica, written: Sequence[Gfns], *, precopy: Iterable[Gfns] = (), final: bool = False
    ) -> Commit:
        """What the machine does with the frames of one epoch, up to its EpochReady."""
        self.epoch += 1
        direct = replica.holding == "partial"
        table = replica.table
        assert table is not None
        changes, count = [], 0
        for iteration, gfns in enumerate(precopy, 1):
            torn = np.full((len(gfns), PAGE_SIZE), 99, dtype=np.uint8)
            changes.append(self._pages(replica, 0, gfns, torn, iteration))
            replica.append(self._frame(Type.ITERATION, encode(Iteration(iteration, len(gfns)))))
            count += len(gfns)
        for region, gfns in enumerate(written):
            rows = self.memory[region][gfns]
            if direct:
                replica.images[region][gfns] = rows
                changes.append((region, gfns, table.hasher.hash_rows(rows)))
            elif len(gfns):
                for part in np.array_split(np.arange(len(gfns)), 1 + len(gfns) // 10):
                    if len(part):
                        changes.append(self._pages(replica, region, gfns[part], rows[part], 0))
            count += len(gfns)
        state, held = b"state of %d" % self.epoch * 50, b"held by %d" % self.epoch
        self._blob(replica, Type.STATE, encode(State(crc32c(state))), state)
        self._blob(replica, Type.OUTPUT, encode(Output(crc32c(held), self.epoch - 1, self.epoch)), held)
        for region, gfns, hashes in changes:
            table.update(region, gfns, hashes)
        self.table.rehash(self.memory)
        self.chain = next_chain(self.chain, self.epoch, self.term, self.table.digest, crc32c(state), crc32c(held))
        commit = Commit(count, self.table.digest, self.chain, "memory", final)
        replica.append(self._frame(Type.COMMIT, encode(commit)))
        self.memories[self.epoch] = [rows.copy() for rows in self.memory]
        self.digests[self.epoch], self.chains[self.epoch] = self.table.digest, self.chain
        return commit

    def commit(self, replica: Replica, commit: Commit, level: str = "memory") -> None:
        replica.commit(self.epoch, self.term, commit.chain, commit.digest, level)

    def go(self, replica: Replica, epochs: int = 1, *, level: str = "memory", most: int = 24) -> None:
        """Whole epochs."""
        for _ in range(epochs):
            self.commit(replica, self.stage(replica, self.run(most)), level)
            replica.apply()

    def make(self, replica: Replica) -> None:
        replica.create(kind="sim", geometry=self.geometry, seed=SEED, run=RUN, term=self.term)

    def _pages(
        self, replica: Replica, region: int, gfns: Gfns, rows: Rows, iteration: int
    ) -> tuple[int, Gfns, np.ndarray]:
        hasher = self.table.hasher
        hashes = hasher.hash_rows(rows)
        kinds = np.where(same(hashes, hasher.zero), np.uint8(ZERO), np.uint8(RAW))
        meta = encode_pages(region, gfns, hashes, iteration, kinds, hasher.zero)
        raw = rows[kinds == RAW]
        frame = pack(Type.PAGES, meta, raw.nbytes, term=self.term, epoch=self.epoch, sequence=0)
        if iteration:
            replica.append(frame, raw.reshape(-1).data)
        else:
            replica.place(_header(frame), meta)[:] = raw.reshape(-1).data
        return region, gfns, hashes

    def _blob(self, replica: Replica, kind: Type, meta: bytes, payload: bytes) -> None:
        frame = pack(kind, meta, len(payload), term=self.term, epoch=self.epoch, sequence=0)
        replica.place(_header(frame), meta)[:] = payload

    def _frame(self, kind: Type, meta: bytes) -> bytes:
        return pack(kind, meta, 0, term=self.term, epoch=self.epoch, sequence=0)


def _header(frame: bytes) -> Header:
    return unpack_header(frame[:48])


def same_memory(one: Sequence[Rows], other: Sequence[Rows]) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def holds(replica: Replica, guest: Guest, epoch: int) -> None:
    """The replica is exactly this epoch of the guest."""
    assert (replica.holding, replica.epoch, replica.reason) == ("committed", epoch, "")
    assert same_memory(replica.images, guest.memories[epoch])
    assert replica.table is not None and replica.table.digest == guest.digests[epoch] == replica.digest
    assert replica.chain == guest.chains[epoch]
    assert replica.state == b"state of %d" % epoch * 50 and replica.held == b"held by %d" % epoch
    assert (replica.released, replica.mark) == (epoch - 1, epoch)
