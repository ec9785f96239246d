"""The VMM's process: `python -m ckptd.guests.kvm.process --listen-fd N --control PATH`.

It owns memory, gate and VM, hands the descriptors of memory and gate to the daemon that attaches, and outlives it (P5):
then the guest goes on, its output stays in the gate, and nothing is logged. Without a machine it is a warm standby,
which waits for `activate`, and ends with the connection.

KVM's dirty log answers this process only, so the daemon's harvest is a command here; gfns and state go back through a
file that both map. The console is `console.sock` beside the control socket: a client types lines, and gets what was
released. The vCPUs have threads of their own; everything else is done in this one.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ckptd.errors import GuestError, StateError
from ckptd.guests.kvm.console import ConsoleServer
from ckptd.guests.kvm.gate import KvmGate, gate_bytes
from ckptd.guests.kvm.machine import Machine
from ckptd.guests.kvm.programs import image_of
from ckptd.guests.kvm.spec import KvmSpec
from ckptd.guests.kvm.state import decode, encode
from ckptd.guests.kvm.vcpu import KICK
from ckptd.guests.process.remote import leave
from ckptd.guests.process.server import Answer, GuestServer, serve_until_end
from ckptd.guests.process.shared import ControlPage, make_file, map_file, read_file
from ckptd.guests.process.wire import MAX_REGIONS
from ckptd.memory.regions import Geometry
from ckptd.trackers.kvm_ring import KvmRingTracker

__all__ = ["KvmProcess", "exchange_bytes", "main"]

_LOOK = 0.1  # seconds between two looks at the guest when nothing happens: how far it is is in the status
_RING_LOOK = 0.005  # the same where a ring may fill
_GATE_LOOK = 0.05  # between two tries to release what could not be written
_STATE_BYTES = 1 << 20
_VCPU_BYTES = 1 << 17
_MARKS_WAIT = 30.0
_SWITCH = 0.0005  # seconds that a thread may keep the interpreter when others want it


def exchange_bytes(spec: KvmSpec) -> int:
    """Bytes of the file through which harvests (8 for each page at most) and states go to the daemon."""
    return 8 * spec.geometry.pages + _STATE_BYTES + spec.vcpus * _VCPU_BYTES


class KvmProcess:
    """The commands, and what has to be done between them."""

    def __init__(self, listener: socket.socket, console: Path) -> None:
        self._server = GuestServer(listener, self._answer, self._lost)
        self._machine: Machine | None = None
        self._gate: KvmGate | None = None
        self._console = ConsoleServer(console)
        self._open = False  # nobody holds output back: the process lets go of it itself
        self._ended = False
        self._page_fd = make_file("ckptd-control", ControlPage.SIZE)
        self._page = ControlPage(map_file(self._page_fd))
        self._attention = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._noticed = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._gate_fd = -1
        self._memory_fds: list[int] = []
        self._exchange_fd = -1
        self._exchange = np.empty(0, dtype=np.uint8)
        self._run = os.urandom(16)
        self._note = ""

    def run(self) -> None:
        """Until `end`, or until a standby's daemon is gone."""
        while not self._ended:
            ready = self._server.wait(self._patience(), [self._noticed, *self._console.descriptors])
            if self._noticed in ready:
                os.eventfd_read(self._noticed)
            if self._machine is not None and self._gate is not None:
                self._between(self._machine, self._gate, ready)
        if self._machine is not None:
            self._machine.end()
        self._console.close()

    def _between(self, machine: Machine, gate: KvmGate, ready: list[int]) -> None:
        self._page.step = sum(vcpu.marks for vcpu in machine.vcpus)
        trouble = ""
        if self._open and gate.released < gate.written:
            try:
                gate.release(gate.written)
            except GuestError as error:  # it stays in the gate, which stalls the guest once it is full
                trouble = str(error)
        if self._console.serve(ready, machine.console, gate):
            machine.wake()
        if isinstance(machine.tracker, KvmRingTracker):
            self._page.losses = machine.tracker.overflows
            if machine.tracker.half_full:
                self._attend()
        self._say(trouble or machine.trouble)

    def _patience(self) -> float | None:
        if self._machine is None:
            return None
        if self._open and self._gate is not None and self._gate.released < self._gate.written:
            return _GATE_LOOK
        return _RING_LOOK if isinstance(self._machine.tracker, KvmRingTracker) else _LOOK

    def _attend(self) -> None:
        if self._server.connected:
            os.eventfd_write(self._attention, 1)

    def _say(self, note: str) -> None:
        """To the status, and once into guest.log."""
        if note != self._note:
            self._note = self._page.note = note
            print(note or "all is well again", file=sys.stderr, flush=True)

    def _lost(self) -> None:
        """The daemon is gone. The guest goes on; nobody harvests, so nothing is logged; the gate holds."""
        if self._machine is None:
            self._ended = True
            return
        if self._machine.tracker is not None:
            self._machine.tracker.stop()
        self._machine.resume()

    # --- commands

    def _answer(self, message: dict[str, Any], fds: list[int]) -> Answer:
        match message.get("op"):
            case "hello":
                return {"pid": os.getpid(), "active": self._machine is not None}, [self._page_fd]
            case "create":
                self._create(KvmSpec.from_dict(message["params"]), message["gate_capacity"])
            case "activate":
                self._activate(message["output"], fds)
            case "attach":
                return self._attach(message["tracker"], message["ring_entries"])
            case "start":
                self._running().chosen_tracker.start()
            case "stop":
                self._running().chosen_tracker.stop()
            case "harvest":
                return self._harvest(), []
            case "pause":
                self._running().pause()
            case "pause at marks":
                self._running().pause_at_marks(_MARKS_WAIT)
            case "save":
                return self._save(), []
            case "resume":
                self._running().resume()
                return None, []
            case "released":
                return None, []  # what follows every command passes it on
            case "end":
                self._ended = True
            case unknown:
                raise GuestError(f"unknown command {unknown!r}")
        return {}, []

    def _running(self) -> Machine:
        if self._machine is None:
            raise StateError("this guest process has no machine yet")
        return self._machine

    def _vacant(self, geometry: Geometry) -> None:
        if self._machine is not None:
            raise StateError("this guest process runs a machine already")
        if len(geometry) > MAX_REGIONS:
            raise GuestError(f"a kvm guest has at most {MAX_REGIONS} regions, not {len(geometry)}")

    def _create(self, spec: KvmSpec, gate_capacity: int) -> None:
        self._vacant(spec.geometry)
        image = image_of(spec)
        memory_fds = [make_file(f"ckptd-{region.name}", region.size_bytes) for region in spec.geometry]
        gate_fd = make_file("ckptd-gate", gate_bytes(gate_capacity))
        machine = self._machine_over(spec, memory_fds, KvmGate(map_file(gate_fd)))
        machine.begin(image)
        self._adopt(machine, gate_fd, memory_fds)

    def _activate(self, output: str | None, fds: list[int]) -> None:
        state_fd, gate_fd, *memory_fds = fds
        state = decode(read_file(state_fd))
        self._vacant(state.spec.geometry)
        if len(memory_fds) != len(state.spec.geometry):
            raise GuestError(f"{len(memory_fds)} descriptors for {len(state.spec.geometry)} regions")
        gate = KvmGate(map_file(gate_fd), None if output is None else Path(output))
        if gate.written != state.written:
            raise GuestError(f"the state has emitted {state.written} bytes, the gate {gate.written}")
        machine = self._machine_over(state.spec, memory_fds, gate)
        machine.restore(state)
        os.close(state_fd)
        self._open = True
        self._adopt(machine, gate_fd, memory_fds)

    def _machine_over(self, spec: KvmSpec, memory_fds: list[int], gate: KvmGate) -> Machine:
        return Machine(spec, [map_file(fd) for fd in memory_fds], gate, attend=self._attend, notice=self._wake)

    def _wake(self) -> None:
        """From a vCPU's thread: output to be let go, or a guest that has stopped."""
        if self._open or (self._machine is not None and self._machine.stopped):
            os.eventfd_write(self._noticed, 1)

    def _adopt(self, machine: Machine, gate_fd: int, memory_fds: list[int]) -> None:
        self._machine, self._gate, self._gate_fd, self._memory_fds = machine, machine.gate, gate_fd, memory_fds
        self._exchange_fd = make_file("ckptd-exchange", exchange_bytes(machine.spec))
        self._exchange = map_file(self._exchange_fd)
        self._console.listen()
        machine.resume()

    def _attach(self, tracker: str, ring_entries: int) -> Answer:
        machine = self._running()
        if tracker == "auto":
            tracker = "kvm-manual" if machine.features.manual_clear else "kvm-bitmap"
        used = machine.use_tracker(tracker, ring_entries)
        self._open = False  # the daemon has the gate from here on
        reply = {"params": machine.spec.as_dict(), "run": self._run, "pid": os.getpid(), "tracker": used.name}
        shared = [self._page_fd, self._attention, self._gate_fd, self._exchange_fd, *self._memory_fds]
        return reply, shared

    def _harvest(self) -> dict[str, Any]:
        tracker = self._running().chosen_tracker
        return leave(tracker.harvest(), tracker.exact, self._exchange)

    def _save(self) -> dict[str, Any]:
        blob = encode(self._running().save())
        if len(blob) > len(self._exchange):
            raise GuestError(f"the state takes {len(blob)} bytes, more than the {len(self._exchange)} reserved for it")
        self._exchange[: len(blob)] = np.frombuffer(blob, dtype=np.uint8)
        return {"bytes": len(blob)}


def _warm_up() -> None:
    """Make a small machine, and take it over, so that a promoted guest need not do anything for the first time."""
    spec = KvmSpec(Geometry.of(warm=32))
    memory = map_file(make_file("ckptd-warm", spec.geometry.size_bytes))
    machine = Machine(spec, [memory], KvmGate(np.zeros(gate_bytes(1), dtype=np.uint8)))
    state = encode(machine.save())
    machine.end()
    again = Machine(spec, [memory], KvmGate(np.zeros(gate_bytes(1), dtype=np.uint8)))
    again.restore(decode(state))
    again.end()


def main(arguments: list[str] | None = None) -> None:
    """Serve until the end."""

    def run(listener: socket.socket, control: Path) -> None:
        signal.signal(KICK, lambda *_: None)  # its arrival is all that matters
        sys.setswitchinterval(_SWITCH)
        _warm_up()
        gc.freeze()  # what was imported is never garbage
        KvmProcess(listener, control.with_name("console.sock")).run()

    serve_until_end(run, "The process of a kvm guest.", arguments)


if __name__ == "__main__":
    main()
