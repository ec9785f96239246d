"""The guest's own process: `python -m ckptd.guests.sim.process --listen-fd N --control PATH`.

It owns memory, log and gate, hands their descriptors to the daemon that attaches, and outlives it (P5): when the
connection ends it goes on, its output stays in the gate, and a later daemon attaches again. One daemon at a time.
Without a machine it is a warm standby, which waits for `activate`, and ends with the connection.

The pause flag is looked at before every step. Where the guest has time to kill (its rate is limited, or it is
stalled) it waits on its sockets, so a pause is answered at once.
"""

from __future__ import annotations

import gc
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ckptd.errors import GuestError, StateError
from ckptd.guests.process.server import Answer, GuestServer, serve_until_end
from ckptd.guests.process.shared import ControlPage, make_file, map_file, read_file
from ckptd.guests.process.wire import MAX_REGIONS
from ckptd.guests.sim.gate import RECORD_SIZE, SimGate, gate_bytes
from ckptd.guests.sim.machine import Machine, Params, header_of
from ckptd.guests.sim.workloads import WORKLOADS
from ckptd.memory.regions import Geometry
from ckptd.trackers.base import Log
from ckptd.trackers.bitmap import BitmapLog, bitmap_log_bytes
from ckptd.trackers.ring import RingLog, ring_log_bytes

__all__ = ["GuestProcess", "main"]

_LOOK_EVERY = 64  # steps between two looks at the sockets of a guest that never waits
_STALL_WAIT = 0.0005  # seconds; releases and harvests come by shared memory and wake nobody
_STALL_WAIT_ALONE = 0.05
_MAX_DEBT = 0.05  # seconds of lost time that a rate-limited guest makes up for


class GuestProcess:
    """The loop of the process: steps, and commands between them."""

    def __init__(self, listener: socket.socket) -> None:
        self._server = GuestServer(listener, self._answer, self._lost)
        self._machine: Machine | None = None
        self._gate: SimGate | None = None
        self._open = False  # nobody holds output back: the guest lets go of it itself
        self._paused = False
        self._ended = False
        self._page_fd = make_file("ckptd-control", ControlPage.SIZE)
        self._page = ControlPage(map_file(self._page_fd))
        self._attention = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._gate_fd = -1
        self._log_fd = -1
        self._memory_fds: list[int] = []
        self._run = os.urandom(16)

    def run(self) -> None:
        """Until `end`, or until a standby's daemon is gone."""
        deadline, since = time.monotonic(), 0
        while not self._ended:
            machine = self._machine
            if machine is None or self._paused:
                self._server.wait(None)
            elif self._page.pause:
                if not self._server.connected:
                    self._page.pause = False
                self._server.wait(_STALL_WAIT)  # the flag runs ahead of the packet
            elif self._stalled(machine):
                if self._server.connected:
                    os.eventfd_write(self._attention, 1)
                self._server.wait(_STALL_WAIT if self._server.connected else _STALL_WAIT_ALONE)
            else:
                wait = machine.params.step_seconds and deadline - time.monotonic()
                if wait > 0 or since >= _LOOK_EVERY:  # a guest that falls short of its rate never waits
                    since = 0
                    self._server.wait(max(wait, 0.0))
                    continue
                since += 1
                # absolute deadlines keep the rate; what was lost beyond the debt (a pause, a stall) is forgiven
                deadline += max(wait, -_MAX_DEBT) - wait + machine.params.step_seconds
                self._step(machine)

    def _step(self, machine: Machine) -> None:
        output = machine.run_step()
        self._page.step = machine.step
        if output is not None and self._gate is not None:
            self._gate.emit(output)
            if self._open:
                with suppress(GuestError):  # it stays in the gate, which stalls the guest once it is full
                    self._gate.release(output.number)

    def _stalled(self, machine: Machine) -> bool:
        if machine.log is not None and machine.log.full:
            return True
        if not machine.emits_next or self._gate is None or not self._gate.full:
            return False
        if self._open:
            with suppress(GuestError):
                self._gate.release(self._gate.written)
        return self._gate.full

    def _lost(self) -> None:
        """The daemon is gone. The guest goes on; nobody harvests, so nothing is logged; the gate holds."""
        self._page.pause = self._paused = False
        if self._machine is None:
            self._ended = True
        elif self._machine.log is not None:
            self._machine.log.disarm()

    def _answer(self, message: dict[str, Any], fds: list[int]) -> Answer:
        match message.get("op"):
            case "hello":
                active = self._machine is not None
                return {"pid": os.getpid(), "active": active}, [self._page_fd]
            case "create":
                self._create(Params.from_dict(message["params"]), message["gate_capacity"])
                return {}, []
            case "activate":
                self._activate(message["output"], fds)
                return {}, []
            case "attach":
                return self._attach(message["tracker"], message["ring_entries"])
            case "pause":
                self._paused = True
                return {"state": self._running().save()}, []
            case "resume":
                self._paused = False  # the flag is the daemon's: it may have set it again already
                return None, []
            case "end":
                self._ended = True
                return {}, []
        raise GuestError(f"unknown command {message.get('op')!r}")

    def _running(self) -> Machine:
        if self._machine is None:
            raise StateError("this guest process has no machine yet")
        return self._machine

    def _vacant(self, geometry: Geometry) -> None:
        if self._machine is not None:
            raise StateError("this guest process runs a machine already")
        if len(geometry) > MAX_REGIONS:
            raise GuestError(f"a sim guest has at most {MAX_REGIONS} regions, not {len(geometry)}")

    def _create(self, params: Params, gate_capacity: int) -> None:
        self._vacant(params.geometry)
        self._gate_fd = make_file("ckptd-gate", gate_bytes(gate_capacity))
        self._memory_fds = [make_file(f"ckptd-{region.name}", region.size_bytes) for region in params.geometry]
        self._gate = SimGate(map_file(self._gate_fd))
        self._machine = Machine(params, [map_file(fd).view(np.uint64) for fd in self._memory_fds])

    def _activate(self, output: str | None, fds: list[int]) -> None:
        state_fd, gate_fd, *memory_fds = fds
        state = read_file(state_fd)
        params = header_of(state).params
        self._vacant(params.geometry)
        if len(memory_fds) != len(params.geometry):
            raise GuestError(f"{len(memory_fds)} descriptors for {len(params.geometry)} regions")
        gate = SimGate(map_file(gate_fd), None if output is None else Path(output))
        machine = Machine.restored(state, [map_file(fd).view(np.uint64) for fd in memory_fds])
        if gate.written != machine.outputs:
            raise GuestError(f"the state has emitted {machine.outputs} outputs, the gate {gate.written}")
        os.close(state_fd)
        self._gate_fd, self._memory_fds = gate_fd, memory_fds
        self._gate, self._machine, self._open = gate, machine, True
        self._page.step = machine.step

    def _attach(self, tracker: str, ring_entries: int) -> Answer:
        machine = self._running()
        params = machine.params
        ring = tracker == "ring"
        size = ring_log_bytes(params.vcpus, ring_entries) if ring else bitmap_log_bytes(params.geometry)
        log_fd = make_file("ckptd-log", size)
        buffer = map_file(log_fd)
        log: Log
        if ring:
            # the reserve is one step's worth: it is what a vCPU still logs after it was seen not to be full
            log = RingLog(params.vcpus, ring_entries, min(params.batch, ring_entries // 2), buffer)
        else:
            log = BitmapLog(params.geometry, buffer)
        if self._log_fd >= 0:
            os.close(self._log_fd)
        machine.log, self._log_fd = log, log_fd
        self._open = False  # the daemon has the gate from here on
        shared = [self._page_fd, self._attention, self._gate_fd, log_fd, *self._memory_fds]
        return {"params": params.as_dict(), "run": self._run, "pid": os.getpid()}, shared


def _warm_up() -> None:
    """Go once through all that a promoted guest does first, so that it need not be done for the first time then."""
    for workload in WORKLOADS:
        params = Params(Geometry.of(warm=16), workload=workload, output_every=1)
        memory = [np.zeros(params.geometry.size_bytes // 8, dtype=np.uint64)]
        machine = Machine.restored(Machine(params, memory).save(), memory)
        gate = SimGate(np.zeros(gate_bytes(RECORD_SIZE), dtype=np.uint8))
        output = machine.run_step()
        if output is not None:
            gate.emit(output)


def main(arguments: list[str] | None = None) -> None:
    """Serve until the end."""

    def run(listener: socket.socket, _: Path) -> None:
        _warm_up()
        gc.freeze()  # what was imported is never garbage
        GuestProcess(listener).run()

    serve_until_end(run, "The process of a sim guest.", arguments)


if __name__ == "__main__":
    main()
