"""Capture and ship: from a guest's dirty pages to frames of an epoch, and back into the dirty set when shipping failed.

Holds the table of page hashes as shipped (so also what is in flight), the pages that still have to be shipped
(`pending`), and a record of every epoch in flight. Invariant: table, with the flights undone, is the table of the last
acknowledged epoch; every page that differs from the table is in the tracker, in `pending`, or in a flight. Knows no
socket, address or configuration.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ckptd.daemon.figures import Recent
from ckptd.daemon.link import Link
from ckptd.daemon.stage import Stage
from ckptd.errors import DigestMismatch, TrackerError
from ckptd.guests.base import Guest
from ckptd.memory.batch import DELTA, RAW, ZERO, DeltaCache, Kinds
from ckptd.memory.digest import HashTable
from ckptd.memory.dirtyset import DirtySet, Gfns, runs_of
from ckptd.memory.hashing import Hashes, PageHasher, Rows
from ckptd.memory.regions import Geometry
from ckptd.protocol.peer import Buffers
from ckptd.protocol.primary import PrimaryMachine
from ckptd.units import PAGE_SIZE

__all__ = ["Encoding", "Flight", "Shipper"]

Encoding = Literal["raw", "xor-lz4", "auto"]

_MAX_SLICES = 64  # buffers of one frame's payload; above it one copy is cheaper than the kernel's walk over them
_MAX_FRAMES = 4  # into which a batch of a scan is cut
_QUEUED = 4 << 20  # bytes waiting for the socket before the next batch is prepared
_CONVERGING = 0.8  # an iteration that leaves more than this part of the last one gains little ...
_PATIENCE = 2  # ... and so many of them in a row gain nothing: pause and send the rest
_AUTO_REST = 64  # batches that go raw after one whose deltas did not pay


@dataclass(slots=True)
class Flight:
    """One epoch on its way: how to undo it, and what its acknowledgement lets go."""

    epoch: int
    began: int = 0  # monotonic ns
    mark: int = 0
    pages: int = 0
    iterations: int = 0
    dirty: list[DirtySet] = field(default_factory=list)
    changes: list[tuple[int, Gfns, Hashes]] = field(default_factory=list)


@dataclass(slots=True)
class Counters:
    """Totals since the daemon started."""

    dirty_pages: int = 0
    unchanged_pages: int = 0
    zero_pages: int = 0
    delta_pages: int = 0
    raw_bytes: int = 0  # of all dirty pages
    payload_bytes: int = 0  # of what was left of them on the wire
    epochs_committed: int = 0
    epochs_rolled_back: int = 0
    outputs_released: int = 0
    rescans: int = 0


class Shipper:
    """The primary's memory side. One epoch at a time, several in flight."""

    def __init__(
        self, guest: Guest, *, stage_bytes: int, batch_bytes: int, encoding: Encoding, cache_bytes: int
    ) -> None:
        self.guest = guest
        self.table: HashTable | None = None
        self.continuous = False  # everything that changed since the table is in the tracker or pending
        self.pending = DirtySet.empty(0)
        self.flights: deque[Flight] = deque()
        self.counters = Counters()
        self.pause_ms, self.commit_ms = Recent(), Recent()
        self._stage = Stage(stage_bytes)
        self.batch_pages = min(batch_bytes // PAGE_SIZE, self.stage_pages)
        self.encoding: Encoding = encoding
        self._cache = DeltaCache(cache_bytes) if encoding != "raw" and cache_bytes else None
        self._cache_bytes = cache_bytes
        self._rest = 0
        self.progress: dict[str, int] = {}

    def begin(self) -> None:
        """The guest is attached: what memory it has is known."""
        self.pending = DirtySet.empty(len(self.geometry))

    @property
    def geometry(self) -> Geometry:
        return self.guest.geometry

    @property
    def stage_pages(self) -> int:
        return self._stage.capacity

    def retune(self, *, batch_bytes: int, encoding: Encoding) -> None:
        """New values from a changed configuration, between epochs."""
        self.batch_pages = min(batch_bytes // PAGE_SIZE, self.stage_pages)
        if encoding != "raw" and self._cache is None and self._cache_bytes:
            self._cache = DeltaCache(self._cache_bytes)
        self.encoding = encoding

    # --- the pairing

    def settle(self, committed: int) -> list[Flight]:
        """The secondary has committed up to this epoch: later flights are undone, earlier ones are returned as safe."""
        while self.flights and self.flights[-1].epoch > committed:
            flight = self.flights.pop()
            for region, gfns, hashes in reversed(flight.changes):
                self._known.update(region, gfns, hashes)
            for dirty in flight.dirty:
                self.pending = self.pending.merge(dirty)
            self.counters.epochs_rolled_back += 1
        safe = list(self.flights)
        self.flights.clear()
        return safe

    def adopt(self, table: HashTable, *, continuous: bool) -> None:
        """The secondary holds this. Unless `continuous`, only a scan can tell what differs from it."""
        self.table, self.continuous = table, continuous
        if self._cache is not None:
            self._cache.clear()

    def fresh_table(self, seed: int) -> HashTable:
        """The table of a memory of zeros."""
        return HashTable(self.geometry, PageHasher(seed))

    # --- while the guest runs

    async def absorb(self) -> None:
        """Take what the tracker has into `pending`, so that its log does not fill while nothing can be shipped."""
        self.pending = self.pending.merge(await self._harvest())

    async def precopy(self, link: Link, machine: PrimaryMachine, flight: Flight, *, most: int, enough: int) -> None:
        """Iterations until at most `enough` pages are dirty, they stop gaining, or `most` were made.

        What is still dirty then is in `pending`.

        Unless the table is continuous, the first iteration compares all of memory with it.
        """
        if not self.continuous or self.pending.overflowed:
            await self._harvest()
            self.pending = DirtySet.empty(len(self.geometry))
            flight.dirty.append(DirtySet.empty(len(self.geometry), overflowed=True))
            await self._scan(link, machine, flight)
            self.continuous = True
        before, stalled = self.geometry.pages, 0
        while flight.iterations < most:
            dirty = (await self._harvest()).merge(self.pending)
            self.pending = DirtySet.empty(len(self.geometry))
            stalled = stalled + 1 if dirty.pages > _CONVERGING * before else 0
            before = dirty.pages
            if dirty.overflowed or dirty.pages <= enough or stalled >= _PATIENCE:
                self.pending = dirty
                return
            flight.dirty.append(dirty)
            self.counters.dirty_pages += dirty.pages
            self.counters.raw_bytes += dirty.pages * PAGE_SIZE
            await self._iteration(link, machine, flight, dirty)

    async def _scan(self, link: Link, machine: PrimaryMachine, flight: Flight) -> None:
        """Iteration 1 of a resync: hash all of memory, send what differs, straight out of the guest's memory."""
        flight.iterations += 1
        self.counters.rescans += 1
        total, done, before = self.geometry.pages, 0, flight.pages
        for region, memory in enumerate(self.guest.memory):
            for start in range(0, len(memory), self.batch_pages):
                rows = memory[start : start + self.batch_pages]
                gfns = np.arange(start, start + len(rows), dtype=np.int64)
                self._ship_rows(link, machine, flight, region, gfns, rows, flight.iterations, scan=True)
                done += len(rows)
                self.progress = {"iteration": flight.iterations, "pages_done": done, "pages_total": total}
                await self._breathe(link)
        self._end_iteration(link, machine, flight, before)

    async def _iteration(self, link: Link, machine: PrimaryMachine, flight: Flight, dirty: DirtySet) -> None:
        flight.iterations += 1
        before, done = flight.pages, 0
        for region, gfns in dirty.batches(self.batch_pages):
            rows = np.empty((len(gfns), PAGE_SIZE), dtype=np.uint8)
            self.guest.read_pages(region, gfns, rows)
            self._ship_rows(link, machine, flight, region, gfns, rows, flight.iterations)
            done += len(gfns)
            self.progress = {"iteration": flight.iterations, "pages_done": done, "pages_total": dirty.pages}
            await self._breathe(link)
        self._end_iteration(link, machine, flight, before)

    def _end_iteration(self, link: Link, machine: PrimaryMachine, flight: Flight, before: int) -> None:
        if flight.pages > before:
            link.send(machine.end_iteration(flight.iterations))

    # --- an epoch

    async def epoch(
        self, link: Link, machine: PrimaryMachine, level: str, *, most: int, final: bool = False, stay: bool = False
    ) -> Flight:
        """One whole epoch, shipped up to its COMMIT. `final` and `stay` leave the guest paused.

        The link's queue must be empty when this is called: the stage is sent from where it is.
        """
        flight = Flight(machine.epoch + 1)
        self.flights.append(flight)
        enough = self.stage_pages // 4
        if final or not self.continuous or self.pending.overflowed:
            await self.precopy(link, machine, flight, most=most, enough=enough)
        await link.room(0)
        while True:
            early = self._copy_early(flight)
            flight.began = began = time.monotonic_ns()
            await self.guest.pause()
            running = False
            try:
                fresh = self._take()
                dirty = fresh.merge(early)
                if dirty.overflowed and flight.iterations >= most:  # the log loses pages faster than they can be sent
                    dirty = DirtySet.everything(self.geometry)
                big = dirty.overflowed or dirty.pages > self.stage_pages
                if big and (dirty.overflowed or not flight.iterations):
                    self.pending = dirty
                    await self.guest.resume()
                    running = True
                    # An epoch that is too large already is not made larger: what one iteration leaves is sent from the
                    # paused guest, which is also what slows a guest that dirties memory faster than it can be sent.
                    await self.precopy(link, machine, flight, most=1 if self.continuous else most, enough=enough)
                    await link.room(0)
                    continue
                flight.dirty.append(dirty)
                if not big:
                    self._stage.copy(self.guest, fresh)
                state = await self.guest.save_state(go_on=not (big or final or stay))
                if late := self.guest.late():
                    dirty = self._with_late(flight, dirty, late)
                    big = big or dirty.pages > self.stage_pages
                    if not big:
                        self._stage.copy(self.guest, late)
                if big:
                    await self._stream(link, machine, flight, dirty)
                gate = self.guest.gate
                flight.mark, released = gate.mark(), gate.released
                held = gate.held(flight.mark)
            finally:
                if not (running or final or stay):
                    await self.guest.resume()
            break
        self.pause_ms.add((time.monotonic_ns() - began) / 1e6)
        self.counters.dirty_pages += dirty.pages
        self.counters.raw_bytes += dirty.pages * PAGE_SIZE
        if not big:
            for region, gfns, rows in self._stage.batches(self.batch_pages):
                self._ship_rows(link, machine, flight, region, gfns, rows, 0)
                await self._breathe(link)
        link.send(machine.save_state(state))
        link.send(machine.output(held, released, flight.mark))
        link.send(machine.commit(self._known.digest, level, final=final))
        return flight

    def acknowledged(self, epoch: int) -> Flight:
        """The oldest flight has landed."""
        flight = self.flights.popleft()
        assert flight.epoch == epoch
        self.counters.epochs_committed += 1
        self.commit_ms.add((time.monotonic_ns() - flight.began) / 1e6)
        return flight

    def check_memory(self) -> None:
        """While paused, right after an epoch: hash all of memory and compare with the table.

        Raises DigestMismatch with region and gfn.
        """
        twin = self._known.copy()
        differing = twin.rehash(self.guest.memory)
        for region, gfns in enumerate(differing.gfns):
            if len(gfns):
                raise DigestMismatch(
                    f"{differing.pages} pages changed without the tracker seeing it",
                    hint="do not trust this tracker here", region=self.geometry[region].name, gfn=int(gfns[0]),
                )  # fmt: skip

    def _take(self) -> DirtySet:
        dirty = self.guest.tracker.harvest().merge(self.pending)
        self.pending = DirtySet.empty(len(self.geometry))
        return dirty

    @staticmethod
    def _with_late(flight: Flight, dirty: DirtySet, late: DirtySet) -> DirtySet:
        flight.dirty.append(late)
        if late.overflowed:
            raise TrackerError("the log lost pages while devices were saved", hint="the guest is compared anew")
        return dirty.merge(late)

    def _copy_early(self, flight: Flight) -> DirtySet:
        """What is copied before the pause need not be copied in it. The stage holds these pages then, and no others."""
        self._stage.clear()
        if not self.guest.copies_early or self.guest.tracker.needs_pause:
            return DirtySet.empty(len(self.geometry))
        early = self._take()
        if early.overflowed or early.pages > self.stage_pages:
            self.pending = early
            return DirtySet.empty(len(self.geometry))
        flight.dirty.append(early)
        self._stage.copy(self.guest, early)
        return early

    async def _stream(self, link: Link, machine: PrimaryMachine, flight: Flight, dirty: DirtySet) -> None:
        """More than the stage holds, and precopy does not converge: send from the paused guest itself."""
        for region, gfns in dirty.batches(self.batch_pages):
            rows = np.empty((len(gfns), PAGE_SIZE), dtype=np.uint8)
            self.guest.read_pages(region, gfns, rows)
            self._ship_rows(link, machine, flight, region, gfns, rows, 0)
            await self._breathe(link)

    def _ship_rows(
        self, link: Link, machine: PrimaryMachine, flight: Flight,
        region: int, gfns: Gfns, rows: Rows, iteration: int, *, scan: bool = False,
    ) -> None:  # fmt: skip
        """Hash, drop what the secondary has already, encode, send."""
        table, counters = self._known, self.counters
        hashes = table.hasher.hash_rows(rows)
        if scan or not flight.iterations:
            changed = np.flatnonzero(table.differing(region, gfns, hashes))
        else:  # an earlier iteration may have sent this page torn: that it is as it was before says nothing
            changed = np.arange(len(gfns), dtype=np.int64)
        if not scan:
            counters.unchanged_pages += len(gfns) - len(changed)
        if not len(changed):
            return
        if len(changed) < len(gfns):
            gfns, hashes = gfns[changed], hashes[changed]
        zero = table.hasher.is_zero(hashes)
        kinds: Kinds = np.where(zero, np.uint8(ZERO), np.uint8(RAW))
        old = table.update(region, gfns, hashes)
        flight.changes.append((region, gfns, old))
        for part in self._frames(gfns, kinds, scan):
            where = changed[part]
            payload = self._payload(
                region, gfns[part], rows, where, hashes[part], old[part], kinds[part], machine, flight, iteration
            )
            link.send(machine.pages(region, gfns[part], hashes[part], kinds[part], iteration, payload))
            counters.payload_bytes += sum(memoryview(one).nbytes for one in payload)
        flight.pages += len(gfns)
        counters.zero_pages += int(np.count_nonzero(zero))

    def _frames(self, gfns: Gfns, kinds: Kinds, scan: bool) -> Iterator[slice]:
        """One frame for all, or in a scan one for each long run, which the receiver can take straight into its image.
        """
        lengths = runs_of(gfns)[1].tolist() if scan and kinds.all() else []
        if not 1 < len(lengths) <= _MAX_FRAMES:
            lengths = [len(gfns)]
        at = 0
        for length in lengths:
            yield slice(at, at + length)
            at += length

    def _payload(
        self, region: int, gfns: Gfns, rows: Rows, where: Gfns, hashes: Hashes, old: Hashes, kinds: Kinds,
        machine: PrimaryMachine, flight: Flight, iteration: int,
    ) -> Buffers:  # fmt: skip
        """The buffers of one frame; marks in `kinds` the pages that go as deltas."""
        block = b""
        if self._cache is not None and self.encoding != "raw" and not iteration:
            sent = np.flatnonzero(kinds)
            fresh = rows[where[sent]]
            if machine.version >= 2 and not flight.iterations and self._try_delta():
                delta = self._cache.encode(region, gfns[sent], fresh, old[sent])
                if delta is not None:
                    kinds[sent[delta.chosen]] = DELTA
                    block = delta.block
                    self.counters.delta_pages += len(delta.chosen)
                elif self.encoding == "auto":
                    self._rest = _AUTO_REST
            self._cache.remember(region, gfns[sent], fresh, hashes[sent])
        raw = where[kinds == RAW]
        starts, lengths = runs_of(raw)
        if len(starts) <= _MAX_SLICES:
            runs = zip(starts.tolist(), lengths.tolist(), strict=True)
            payload: Buffers = [rows[start : start + length].reshape(-1).data for start, length in runs]
        else:
            payload = [rows[raw].reshape(-1).data]
        return [*payload, block] if block else payload

    def _try_delta(self) -> bool:
        self._rest = max(0, self._rest - 1)
        return self.encoding == "xor-lz4" or not self._rest

    async def _harvest(self) -> DirtySet:
        if not self.guest.tracker.needs_pause:
            return self.guest.tracker.harvest()
        await self.guest.pause()
        try:
            return self.guest.tracker.harvest()
        finally:
            await self.guest.resume()

    async def _breathe(self, link: Link) -> None:
        """Let acknowledgements and heartbeats through, and do not run ahead of the socket."""
        if link.queued > _QUEUED:
            await link.room(_QUEUED // 2)
        else:
            if link.error is not None:
                raise link.error
            await asyncio.sleep(0)

    @property
    def _known(self) -> HashTable:
        assert self.table is not None
        return self.table
