"""A real sim machine with its log and gate in this process, and a receiving machine that can be cut off at any byte."""

from __future__ import annotations

import asyncio
import socket
import time

import numpy as np
import numpy.typing as npt

from ckptd.errors import StateError, TransportError
from ckptd.guests.sim.gate import SimGate, gate_bytes
from ckptd.guests.sim.machine import Machine, Params
from ckptd.memory.dirtyset import DirtySet, Gfns
from ckptd.memory.regions import Geometry
from ckptd.protocol.peer import Event, Timing
from ckptd.protocol.secondary import EpochReady, HelloReceived, SecondaryMachine, TableWanted
from ckptd.trackers.bitmap import BitmapLog, BitmapTracker, bitmap_log_bytes
from ckptd.units import PAGE_SIZE
from tests.protocol.world import RUN, MemoryHolding

__all__ = ["CALM", "SteppedGuest", "serve"]

CALM = Timing(10**12, 2 * 10**12)


class _AtAnyTime(BitmapTracker):
    """Here the guest never runs beside its harvester."""

    needs_pause = False


class SteppedGuest:
    """A Guest that moves only when `step` is called, and never while it is paused."""

    name, kind, run, opens_at_detach = "vm", "sim", RUN, False

    def __init__(self, geometry: Geometry, *, output_every: int = 2, batch: int = 8, early: bool = False) -> None:
        self.geometry = geometry
        params = Params(geometry, seed=5, vcpus=2, workload="kv", output_every=output_every, batch=batch)
        self.vcpus = params.vcpus
        log = np.zeros(bitmap_log_bytes(geometry), dtype=np.uint8)
        words = [np.zeros(region.size_bytes // 8, dtype=np.uint64) for region in geometry]
        self.memory = [one.view(np.uint8).reshape(-1, PAGE_SIZE) for one in words]
        self.machine = Machine(params, words, BitmapLog(geometry, log))
        self.tracker = (_AtAnyTime if early else BitmapTracker)(geometry, log)
        self.gate = SimGate(np.zeros(gate_bytes(1 << 20), dtype=np.uint8))
        self.paused = False
        self.copies_early = early
        self.devices: list[int] = []  # pages of the last region that are written while devices are saved
        self.tracker.start()

    def step(self, steps: int) -> None:
        assert not self.paused
        for _ in range(steps):
            if (output := self.machine.run_step()) is not None:
                self.gate.emit(output)

    async def attach(self) -> None: ...
    async def detach(self) -> None: ...
    async def end(self) -> None: ...
    def clear_attention(self) -> None: ...

    async def pause(self) -> None:
        if self.paused:
            raise StateError("the guest is paused already")
        if self.copies_early:
            self.step(2)  # it runs until it stands
        self.paused = True

    async def resume(self) -> None:
        if not self.paused:
            raise StateError("the guest is not paused")
        self.paused = False

    async def save_state(self, *, go_on: bool = False) -> bytes:
        for page in self.devices:
            self.memory[-1][page] += 1
        return self.machine.save()

    def late(self) -> DirtySet | None:
        return DirtySet.from_gfns([[]] * (len(self.geometry) - 1) + [self.devices]) if self.devices else None

    def read_pages(self, region: int, gfns: Gfns, out: npt.NDArray[np.uint8]) -> None:
        np.take(self.memory[region], gfns, axis=0, out=out, mode="clip")

    def attention(self) -> int | None:
        return None

    def alive(self) -> bool:
        return True

    def facts(self) -> dict[str, object]:
        return {}


async def serve(sock: socket.socket, holding: MemoryHolding, cut_after: int | None) -> None:
    """Be the secondary of one connection, until it ends or `cut_after` bytes were received."""
    loop, machine, received = asyncio.get_running_loop(), SecondaryMachine(CALM, 0), 0

    async def answer(event: Event) -> None:
        match event:
            case HelloReceived():
                if holding.holding == "partial":  # a cut may have left half a page, as the daemon knows
                    assert holding.table is not None
                    holding.table.rehash(holding.images)
                await loop.sock_sendall(sock, b"".join(machine.welcome(holding)))
            case TableWanted():
                for frame in machine.table_frames():
                    await loop.sock_sendall(sock, b"".join(frame))
            case EpochReady():
                holding.commit(event)
                await loop.sock_sendall(sock, b"".join(machine.acknowledge(event.level)))

    try:
        while cut_after is None or received < cut_after:
            area = machine.buffer()
            if cut_after is not None:
                area = area[: cut_after - received]
            count = await loop.sock_recv_into(sock, area)
            if not count:
                return
            received += count
            machine.received(count, time.monotonic_ns())
            while (event := machine.next_event()) is not None:
                await answer(event)
    except (OSError, TransportError):
        pass
    finally:
        machine.abandon()
        sock.close()
