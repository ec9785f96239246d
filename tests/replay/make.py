"""Makes the recorded history: `python -m tests.replay.make`. Only when the format of recordings has changed.

A sim guest and its two machines in one process, so that the same history comes out each time. It has what a history
can have: a first image by precopy, deltas, torn pages, epochs without pages, held output of several epochs, a broken
link and a higher term after it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from ckptd.guests.sim.gate import SimGate, gate_bytes
from ckptd.guests.sim.machine import Machine, Params
from ckptd.memory.batch import DELTA, RAW, ZERO, DeltaCache
from ckptd.memory.digest import HashTable
from ckptd.memory.hashing import PageHasher
from ckptd.memory.regions import Geometry
from ckptd.protocol.peer import Buffers, Event, Peer
from ckptd.protocol.primary import PrimaryMachine, Welcomed
from ckptd.protocol.secondary import EpochReady, HelloReceived, SecondaryMachine
from ckptd.replica.recording import export
from ckptd.replica.replica import Replica
from ckptd.trackers.bitmap import BitmapLog, BitmapTracker, bitmap_log_bytes
from ckptd.units import PAGE_SIZE
from tests.replay.history import ABOUT, NEVER, RECORDING, open_replica

__all__ = ["make"]

PARAMS = Params(Geometry.of(ram=96, video=32), seed=2016, vcpus=2, workload="kv", output_every=3, batch=8)
SEED, RUN = 0x5EED, bytes(range(16))
STEPS = (40, 3, 1, 0, 7, 5, 2, 9, 4, 0, 6, 8, 3)
"""Steps of each epoch. Some have precopy: half of their steps before, one while its pages are on their way."""
PRECOPY = {1, 8}
RECONNECT = {6: 3}
"""The link breaks before this epoch, and comes back in this term."""
WINDOW = 2
"""Epochs after which an epoch's output is let go of."""


class Maker:
    """The guest and its shipping side; `replica` is the other."""

    def __init__(self, replica: Replica) -> None:
        geometry = PARAMS.geometry
        log = np.zeros(bitmap_log_bytes(geometry), dtype=np.uint8)
        self.memory = [np.zeros((region.pages, PAGE_SIZE), dtype=np.uint8) for region in geometry]
        words = [rows.reshape(-1).view(np.uint64) for rows in self.memory]
        self.machine = Machine(PARAMS, words, BitmapLog(geometry, log))
        self.tracker = BitmapTracker(geometry, log)
        self.tracker.start()
        self.gate = SimGate(np.zeros(gate_bytes(1 << 16), dtype=np.uint8))
        self.marks: deque[int] = deque()
        self.deltas = 0  # pages of this epoch that went as deltas
        self.table = HashTable(geometry, PageHasher(SEED))
        self.cache = DeltaCache(1 << 20)
        self.replica = replica
        self.primary, self.secondary = self.connect(1)

    def connect(self, term: int) -> tuple[PrimaryMachine, SecondaryMachine]:
        replica = self.replica
        primary, secondary = PrimaryMachine(PARAMS.geometry, NEVER, 0), SecondaryMachine(NEVER, 0)
        hello = primary.hello("kv", "sim", RUN, SEED, term, "memory", False)
        assert isinstance(_deliver(secondary, hello)[0], HelloReceived)
        if replica.holding == "empty":
            replica.create(kind="sim", geometry=PARAMS.geometry, seed=SEED, run=RUN, term=term)
        assert isinstance(_deliver(primary, secondary.welcome(replica))[0], Welcomed)
        primary.begin(self.table.hasher.zero)
        self.cache.clear()
        return primary, secondary

    def run(self, steps: int) -> None:
        for _ in range(steps):
            output = self.machine.run_step()
            if output is not None:
                self.gate.emit(output)

    def epoch(self, number: int, steps: int) -> dict[str, Any]:
        """One epoch, shipped and committed; what the guest itself is then."""
        self.deltas = 0
        if number in RECONNECT:
            self.secondary.abandon()
            self.primary, self.secondary = self.connect(RECONNECT[number])
        if number in PRECOPY:
            self.run(steps // 2)
            self.ship(1)
            _deliver(self.secondary, self.primary.end_iteration(1))
            steps -= steps // 2 + 1
        self.run(steps)
        self.ship(0)
        released, mark = self.gate.released, self.gate.mark()
        for frame in (
            self.primary.save_state(self.machine.save()),
            self.primary.output(self.gate.held(mark), released, mark),
            self.primary.commit(self.table.digest, "memory"),
        ):
            events = _deliver(self.secondary, frame)
        [ready] = events
        assert isinstance(ready, EpochReady)
        self.replica.commit(ready.epoch, ready.term, ready.chain, ready.digest, ready.level)
        _deliver(self.primary, self.secondary.acknowledge(ready.level))
        self.replica.apply()
        self.marks.append(mark)
        if len(self.marks) > WINDOW:
            self.gate.release(self.marks.popleft())
        own = HashTable(PARAMS.geometry, self.table.hasher)
        own.rehash(self.memory)
        return {
            "epoch": number, "term": ready.term, "step": self.machine.step, "digest": own.digest.hex(),
            "chain": ready.chain.hex(), "released": released, "mark": mark,
            "deltas": self.deltas,
        }  # fmt: skip

    def ship(self, iteration: int) -> None:
        """The dirty pages; those of an iteration are read one step after they were hashed."""
        hasher = self.table.hasher
        batches = list(self.tracker.harvest().batches(64))
        hashed = [hasher.hash_rows(self.memory[region][gfns]) for region, gfns in batches]
        self.run(1 if iteration else 0)
        for (region, gfns), hashes in zip(batches, hashed, strict=True):
            changed = self.table.differing(region, gfns, hashes)
            gfns, hashes = gfns[changed], hashes[changed]
            if not len(gfns):
                continue
            rows = self.memory[region][gfns]
            kinds = np.where(hasher.is_zero(hashes), np.uint8(ZERO), np.uint8(RAW))
            old = self.table.update(region, gfns, hashes)
            block = b""
            if not iteration:
                if self.replica.epoch and (delta := self.cache.encode(region, gfns, rows, old)) is not None:
                    kinds[delta.chosen], block = DELTA, delta.block
                    self.deltas += len(delta.chosen)
                self.cache.remember(region, gfns, rows, hashes)
            payload: Buffers = [rows[kinds == RAW].reshape(-1).data, block]
            _deliver(self.secondary, self.primary.pages(region, gfns, hashes, kinds, iteration, payload))


def _deliver(machine: Peer, buffers: Buffers) -> list[Event]:
    data, events = memoryview(b"".join(buffers)), []
    while data:
        area = machine.buffer()
        count = min(len(area), len(data))
        area[:count], data = data[:count], data[count:]
        machine.received(count, 0)
        while (event := machine.next_event()) is not None:
            events.append(event)
    return events


def make(recording: Path, about: Path) -> None:
    """Write both files; they must not be there."""
    with tempfile.TemporaryDirectory() as place:
        replica = open_replica(Path(place) / "kv", history=100)
        try:
            maker = Maker(replica)
            epochs = [maker.epoch(number, steps) for number, steps in enumerate(STEPS, 1)]
            export(replica, recording)
        finally:
            replica.close()
    about.write_text(json.dumps({"params": PARAMS.as_dict(), "epochs": epochs}, indent=1) + "\n")


if __name__ == "__main__":
    for path in (RECORDING, ABOUT):
        path.unlink(missing_ok=True)
    make(RECORDING, ABOUT)
    print(f"{RECORDING}: {RECORDING.stat().st_size} bytes", file=sys.stderr)
