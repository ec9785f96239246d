"""The keeper of a QEMU guest: `python -m ckptd.guests.qemu.process --listen-fd N --control PATH`.

It stands between a daemon and a QEMU that runs anyway: it speaks QEMU's monitor, takes the dirty log, and holds the
gate. It outlives the daemon (P5): then the guest goes on, nothing is logged, and what the guest says is held; once the
gate is full the guest is stopped. It ends when QEMU ends, or when the daemon detaches: then nothing of it is left in
QEMU. If it is killed QEMU drops what the guest says, until a new keeper takes its place.

A pause is `stop`, the gate's mark, and the device state (everything but RAM, into a file of ours, in the way that this
QEMU has: saving.py). While QEMU writes that, the dirty log is taken and the
daemon copies pages; afterwards the log is taken once more, so that a device which writes to RAM as it is saved is not
missed.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ckptd.errors import CkptdError, GuestError, StateError
from ckptd.guests.process.remote import leave
from ckptd.guests.process.server import Answer, GuestServer, serve_until_end
from ckptd.guests.process.shared import ControlPage, make_file, map_file
from ckptd.guests.qemu.gate import GATE_BYTES
from ckptd.guests.qemu.ram import backends_of, open_backing
from ckptd.guests.qemu.said import write_records
from ckptd.guests.qemu.spec import QemuSpec
from ckptd.guests.qemu.state import describe
from ckptd.guests.qemu.vm import STOPPED_BYTES, STOPPED_FILE, Vm
from ckptd.trackers.base import Tracker
from ckptd.trackers.process import process_tracker

__all__ = ["QemuProcess", "main"]

_LOOK = 0.5  # seconds between two looks at nothing in particular


class QemuProcess:
    """The commands, and what has to be done between them."""

    def __init__(self, listener: socket.socket, runtime: Path) -> None:
        self._server = GuestServer(listener, self._answer, self._lost)
        self._runtime = runtime
        self._vm: Vm | None = None
        self._spec: QemuSpec | None = None
        self._tracker: Tracker | None = None
        self._ended = False
        self._paused = self._stalled = False
        self._page_fd = make_file("ckptd-control", ControlPage.SIZE)
        self._page = ControlPage(map_file(self._page_fd))
        self._attention = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._noticed = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._head_fd = make_file("ckptd-gate", GATE_BYTES)
        self._head = map_file(self._head_fd)
        self._said_fd = make_file("ckptd-said", 0)
        self._exchange_fd = -1
        self._exchange = np.empty(0, dtype=np.uint8)
        self._opened: list[int] = []
        self._tracking = False
        self._note = ""
        stopped = os.open(runtime / STOPPED_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(stopped, STOPPED_BYTES)
        self._stopped = map_file(stopped)
        os.close(stopped)

    def run(self) -> None:
        """Until `end`, until QEMU has ended, or until the daemon of one that never attached is gone."""
        try:
            while not self._ended:
                vm = self._vm
                also = [self._noticed] if vm is None else [self._noticed, vm.pidfd, vm.monitor.fileno()]
                ready = self._server.wait(_LOOK, also)
                if vm is not None and not self._ended:
                    self._between(vm, ready)
        except GuestError as error:
            self._say(str(error))
        finally:
            self._leave()

    def _between(self, vm: Vm, ready: list[int]) -> None:
        if vm.pidfd in ready:
            with suppress(GuestError):
                vm.events()
            raise vm.ended()
        if self._noticed in ready:
            os.eventfd_read(self._noticed)
        vm.events()
        self._stall(vm)
        lost = ", ".join(vm.holder.lost())
        lost = f"the filter of {lost} was taken out of QEMU" if lost else ""
        if taken := ", ".join(vm.holder.lost_streams()):
            lost = lost or f"somebody else has changed the chardev {taken}: what it says is not held"
        self._say(vm.holder.trouble or lost or vm.holder.unwritten() or vm.stands_because())

    def _stall(self, vm: Vm) -> None:
        """A full gate stops the guest, and one that is half free lets it go on: nothing is ever dropped."""
        if vm.holder.full:
            self._stalled = True
            if not self._paused:
                vm.stop()  # again, if somebody else has let it go on
            self._attend()
        elif self._stalled and not vm.holder.full:
            self._stalled = False
            if not self._paused:
                vm.go()

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
        if self._vm is None:
            self._ended = True
            return
        self._tracking = False
        if self._tracker is not None:
            with suppress(CkptdError):
                self._tracker.stop()
        self._resume()

    def _leave(self) -> None:
        """Out of QEMU, if it is there."""
        vm, self._vm = self._vm, None
        if vm is not None:
            if self._tracker is not None:
                with suppress(CkptdError):
                    self._tracker.stop()
            vm.let_go()

    # --- commands

    def _answer(self, message: dict[str, Any], fds: list[int]) -> Answer:
        match message.get("op"):
            case "hello":
                return {"pid": os.getpid(), "active": self._vm is not None}, [self._page_fd]
            case "create":
                self._create(QemuSpec.from_dict(message["params"]), message["gate_capacity"])
            case "attach":
                return self._attach(message["tracker"])
            case "start":
                self._chosen.start()
                self._tracking = True
            case "stop":
                self._tracking = False
                self._chosen.stop()
            case "harvest":
                tracker = self._chosen
                return leave(tracker.harvest(), tracker.exact, self._exchange), []
            case "pause":
                return self._pause(message["since"]), []
            case "save":
                return self._save(message["go_on"]), []
            case "resume":
                self._resume()
            case "quit":
                self._quit()
            case "end":
                self._ended = True
                self._leave()
            case unknown:
                raise GuestError(f"unknown command {unknown!r}")
        return {}, []

    def _create(self, spec: QemuSpec, capacity: int) -> None:
        if self._vm is not None:
            raise StateError("this process keeps a guest already")
        self._vm, self._spec = Vm(spec, capacity, self._head, self._noticed, self._stopped, self._runtime), spec
        print(self._vm.proof, file=sys.stderr, flush=True)
        self._exchange_fd = make_file("ckptd-exchange", 8 * self._vm.geometry.pages)
        self._exchange = map_file(self._exchange_fd)

    def _attach(self, tracker: str) -> Answer:
        vm = self._running
        assert self._spec is not None
        self._tracking = False
        if self._tracker is not None:
            self._tracker.stop()
        for fd in self._opened:
            os.close(fd)
        addresses = [one.address for one in backends_of(vm.survey)]
        assert None not in addresses  # else it was refused
        self._tracker = process_tracker(tracker, vm.geometry, vm.pid, [at for at in addresses if at is not None])
        about = make_file("ckptd-about", 0)
        os.pwrite(about, describe(vm.survey, vm.way), 0)
        backing = [open_backing(vm.pid, one) for one in backends_of(vm.survey)]
        self._opened = [about, *(fd for fd in backing if fd >= 0)]
        reply = {
            "params": self._spec.as_dict(), "run": vm.run, "pid": os.getpid(), "qemu": vm.pid,
            "tracker": self._tracker.name, "needs_pause": self._tracker.needs_pause,
            "mapped": [fd >= 0 for fd in backing],
        }  # fmt: skip
        own = [self._page_fd, self._attention, self._head_fd, vm.holder.wake, vm.state_fd]
        return reply, [*own, self._exchange_fd, self._said_fd, *self._opened]

    def _pause(self, since: int) -> dict[str, Any]:
        vm = self._running
        self._paused = True
        try:
            vm.pause()
            mark = vm.holder.mark()
            reply = {"mark": mark, "said": self._tell(vm, since, mark) if vm.holder.streams else 0}
            if not self._tracking:
                return reply
            tracker = self._chosen
            return reply | leave(tracker.harvest(), tracker.exact, self._exchange)
        except BaseException:
            self._resume()
            raise

    def _tell(self, vm: Vm, since: int, mark: int) -> int:
        """Leave what was said on chardevs after `since` where the daemon finds it; how many bytes."""
        told = write_records(vm.holder.said(since, mark))
        if told:
            os.pwrite(self._said_fd, told, 0)
        os.ftruncate(self._said_fd, len(told))
        return len(told)

    def _save(self, go_on: bool) -> dict[str, Any]:
        """The last word on a pause: the device state, what devices wrote while they were saved, and that nobody ran.
        From here on nothing leaves that is not released."""
        vm, tracker = self._running, self._chosen
        size = vm.end_save()
        late = leave(tracker.harvest(), tracker.exact, self._exchange)
        vm.events()
        if not self._paused or vm.meddled:
            raise GuestError(
                "somebody else let the guest go on while it was paused for a checkpoint: this epoch is void",
                hint="let one program control this QEMU", pid=vm.pid,
            )  # fmt: skip
        if not size:
            raise StateError("no device state was asked for in this pause")
        if not vm.holder.holding:
            vm.holder.hold()
        went_on = go_on and not late["overflowed"] and not any(late["counts"])
        if went_on:
            self._resume()
        return {"bytes": size, "went_on": went_on, **late}

    def _resume(self) -> None:
        self._paused = False
        if self._vm is not None and not self._stalled:
            self._vm.go()

    def _quit(self) -> None:
        """The guest was handed over: it must never run here again."""
        vm, self._vm, self._ended = self._running, None, True
        with suppress(GuestError):
            vm.monitor.execute("quit")
        vm.close()

    @property
    def _running(self) -> Vm:
        if self._vm is None:
            raise StateError("this process keeps no guest yet")
        return self._vm

    @property
    def _chosen(self) -> Tracker:
        if self._tracker is None:
            raise StateError("no tracker was chosen: attach first")
        return self._tracker


def main(arguments: list[str] | None = None) -> None:
    """Serve until the end."""

    def run(listener: socket.socket, control: Path) -> None:
        gc.freeze()  # what was imported is never garbage
        QemuProcess(listener, control.parent).run()

    serve_until_end(run, "The keeper of a QEMU guest.", arguments)


if __name__ == "__main__":
    main()
