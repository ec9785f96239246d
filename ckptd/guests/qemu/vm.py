"""A QEMU that is attached to, as its keeper has it: stopped, saved and let go on, and left as it was found.

Others may stop it or let it go on at any time; QEMU's events tell. What they have stopped stays stopped. What the
keeper itself has stopped is written down where the next keeper finds it, so that a guest does not stand for ever
because its keeper was killed in a pause.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ckptd.errors import CkptdError, GuestError
from ckptd.guests.process.shared import make_file
from ckptd.guests.qemu import filters
from ckptd.guests.qemu.chardevs import Chardevs
from ckptd.guests.qemu.gate import Holder
from ckptd.guests.qemu.qmp import Event, Monitor, QmpError
from ckptd.guests.qemu.ram import geometry_of
from ckptd.guests.qemu.refusals import MIGRATING, RUN_STATES, refusals, run_state
from ckptd.guests.qemu.saving import OPAQUE, Saver, saver
from ckptd.guests.qemu.spec import QemuSpec
from ckptd.guests.qemu.survey import Survey
from ckptd.guests.qemu.surveyor import survey
from ckptd.memory.regions import Geometry

__all__ = ["STOPPED_BYTES", "STOPPED_FILE", "Vm", "stands_as_saved", "stands_for_us"]

STOPPED_FILE, STOPPED_BYTES = "guest.stopped", 4096
"""Of the file that says what the keeper has stopped: 16 bytes of the run, and one of the following; from byte 64 on
what its `Saver` must not forget."""

_FREE, _FOR_US, _AS_SAVED = 0, 1, 2  # the last: somebody else has stopped it, but saving has left its mark on it
_MEMORY = 64
_SETTLED = 10.0  # seconds in which the saving that a killed keeper has begun must end
_LET_GO = 4.0  # seconds for QEMU to take what is released at the end
_LITTLE = 1 << 16  # bytes that it takes at once
_SETTLE = 0.2  # seconds for its netdev to take much: what that has not taken at a stop QEMU throws away


class _Asking:
    """The monitor as the survey asks it."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        return self._monitor.execute(command, arguments)

    async def human(self, line: str) -> str:
        return self._monitor.human(line)


class Vm:
    """A QEMU that is attached to: what it is, and all that we have of it. Raises GuestError when it is gone.

    `head` and `notice` are the gate's; `stopped` is the memory of what was stopped; `runtime` is the guest's directory.
    """

    def __init__(
        self, spec: QemuSpec, capacity: int, head: npt.NDArray[np.uint8], notice: int, stopped: npt.NDArray[np.uint8],
        runtime: Path,
    ) -> None:  # fmt: skip
        self.monitor = Monitor(spec.qmp)
        self.pidfd = self.state_fd = -1
        self._saver: Saver | None = None
        self.proof = ""  # that it can be saved, and what that costs
        self.running = self.own_stop = False  # the latter: the guest stands because we have stopped it
        self.meddled = False  # somebody else has made it run, or reset it, since the last `pause`
        self._saving = self._in_pause = False
        self._entered = False  # filters of ours are in QEMU
        self._asked_at = 0  # when we asked for the last stop; microseconds, as QEMU has them
        self._end = ""
        self._because: str | None = None
        self._stopped = stopped
        self.holder = Holder(head, capacity, lambda: os.eventfd_write(notice, 1))
        self._chardevs = Chardevs(self.monitor, self.holder, dict(spec.chardevs), runtime)
        try:
            self.pid = self.monitor.peer_pid
            self.pidfd = os.pidfd_open(self.pid)
            self.run = _run_of(self.pid)
            ours = _says(self._stopped[:17].tobytes(), self.run, _FOR_US)
            if ours:
                self._settle()
            found = asyncio.run(survey(_Asking(self.monitor), self.pid))
            if ours and found.status == "postmigrate":
                found = replace(found, status="paused")
            others = (one for one in found.chardevs if not filters.is_ours(one.label))
            self.survey: Survey = replace(found, chardevs=tuple(others))
            if why := refusals(self.survey, disks=spec.disks, ignore_blocks=spec.ignore_ram):
                raise GuestError("this QEMU cannot be protected: " + "; ".join(why), pid=self.pid)
            self._chardevs.check(self.survey.argv)
            self.geometry: Geometry = geometry_of(self.survey)
            self.running = self.survey.status == "running"
            self._remember()
            self._enter()
            self._prove()
            self._chardevs.enter()
        except BaseException:
            self.let_go()
            raise

    @property
    def way(self) -> str:
        """In which it is saved: see saving.py."""
        return self._saver.way if self._saver is not None else ""

    def _settle(self) -> None:
        """A migration by which a killed keeper was saving fails, as nobody reads it: wait for that."""
        until = time.monotonic() + _SETTLED
        while time.monotonic() < until:
            state = self.monitor.execute("query-migrate").get("status", "none")
            if state not in MIGRATING and self.monitor.execute("query-status")["status"] != "finish-migrate":
                break
            time.sleep(0.005)

    def _remember(self) -> None:
        """Did a keeper that was killed stop it?"""
        if self.survey.status == "paused" and _says(self._stopped[:17].tobytes(), self.run, _FOR_US):
            self.own_stop = True
        if self._stopped[:16].tobytes() != self.run:
            self._stopped[_MEMORY:] = 0
        self._stopped[16] = self.own_stop
        self._stopped[:16] = np.frombuffer(self.run, dtype=np.uint8)

    def _mark(self) -> None:
        """Write down why it stands."""
        parked = self._saver is not None and self._saver.parks and (self._saving or self._saver.parked)
        self._stopped[16] = _FOR_US if self.own_stop else _AS_SAVED if parked else _FREE

    def _enter(self) -> None:
        left = self.monitor.execute("query-fdsets")
        self.state_fd = make_file("ckptd-state", 0)
        self._saver = saver(self.survey, self.monitor, self.state_fd, self._stopped[_MEMORY:])
        self.stop()  # a filter of a keeper that was killed still keeps packets back: until ours are there
        self._entered = True
        filters.remove(self.monitor)
        for lane in filters.insert(self.monitor, [one.id for one in self.survey.netdevs]):
            self.holder.add(*lane)
        self.go()
        for one in left:  # by a keeper that was killed; QEMU closes it at once only while the guest runs
            if one["fds"] and all(fd.get("opaque") == OPAQUE for fd in one["fds"]):
                self.monitor.execute("remove-fd", {"fdset-id": one["fdset-id"]})

    def _prove(self) -> None:
        """Save it once, before anybody relies on it. Raises GuestError, with the cure."""
        began = time.monotonic()
        self.pause()
        try:
            size = self.end_save()
        finally:
            self.go()
        self.proof = f"devices: {size} bytes by {self.way}, {1000 * (time.monotonic() - began):.1f} ms for the first"

    def events(self) -> None:
        """What has happened in QEMU since the last look."""
        try:
            self.monitor.poll()
        except GuestError as error:
            self._read()
            raise (self.ended() if self._end else error) from error
        self._read()

    def _read(self) -> None:
        while self.monitor.events:
            event = self.monitor.events.popleft()
            match event["event"]:
                case "STOP":
                    self.running, self._because = False, None
                    self.holder.stand()
                    if _stamp(event) < self._asked_at:  # somebody else was there before us
                        self.own_stop = False
                    elif self._in_pause and self.meddled:  # it was made to run, and stopped again to be saved
                        self.own_stop = True
                    self._mark()
                case "RESUME":
                    self.running = self.meddled = True
                    self._because = ""
                    self.holder.go()
                    self._heard(event)
                    self._mark()
                case "RESET":
                    self.meddled = True
                    self._heard(event)
                case "MIGRATION":
                    self._heard(event)
                case "SHUTDOWN":
                    self._end = str(event.get("data", {}).get("reason", ""))

    def _heard(self, event: Event) -> None:
        if self._saver is not None:
            self._saver.heard(event)

    def ended(self) -> GuestError:
        """The error that says so."""
        return GuestError("QEMU has ended" + (f": {self._end}" if self._end else ""), pid=self.pid)

    def stands_because(self) -> str:
        """Why the guest stands, if not for our sake; empty if it runs."""
        if self.running or self.own_stop:
            return ""
        if self._because is None:
            status = self.monitor.execute("query-status")["status"]
            if self._stopped[16] == _AS_SAVED and status in ("finish-migrate", "postmigrate"):
                status = "paused"
            try:
                self._because = str(run_state(status))
            except GuestError as error:
                self._because = error.message
        return self._because

    def pause(self) -> None:
        """`stop`, from which on `meddled` tells whether it lasts; and QEMU saves its devices next: see `end_save`."""
        self.events()
        self.meddled = False
        self._refuse_odd()
        number = self._begin_stop() if self.running else 0
        if self._chardevs:
            if number:
                self.monitor.finish("stop", number)
                self.events()
                number = 0
            self._say_all()
        self._begin_save()  # asked for together: between the two QEMU does not wait for us, nor for a CPU
        if number:
            self.monitor.finish("stop", number)
            self.events()

    def _say_all(self) -> None:
        """A chardev that has found its socket full says more once there is room, though the guest stands. A state that
        is saved meanwhile would not fit what was said: so let it say everything first."""
        while self.holder.unsure():
            for _ in range(2):  # QEMU's main loop has been around, and has seen that there is room
                self.monitor.execute("query-status")

    def _refuse_odd(self) -> None:
        """A guest that has panicked or shut down would look as if it could go on, once it were saved by migration."""
        if self.running or self.own_stop or self._saver is None or not self._saver.parks or self._saver.parked:
            return
        status = self.monitor.execute("query-status")["status"]
        if status not in ("running", "paused", "prelaunch"):
            state = RUN_STATES.get(status)
            raise GuestError(f"{state.why if state else status}: it cannot be saved before it has gone on")

    def stop(self) -> None:
        self.events()
        if self.running:
            self.monitor.finish("stop", self._begin_stop())
            self.events()

    def _begin_stop(self) -> int:
        self._stopped[16] = 1
        self._asked_at = time.time_ns() // 1000
        self.own_stop, self.running = True, False
        return self.monitor.begin("stop")

    def go(self) -> None:
        """If it stands for our sake, it goes on."""
        if self._saving:
            with suppress(QmpError):  # nobody has asked for it: this pause was for something else
                self.end_save()
        self._in_pause = False
        if self.own_stop:
            self.own_stop = False
            self.monitor.execute("cont")
            self._stopped[16] = _FREE
            self.running = True  # unless an event says that somebody has stopped it since
            self.holder.go()
            self.events()

    def _begin_save(self) -> None:
        self.end_save()
        assert self._saver is not None
        self._saving = True
        self._mark()  # before it begins: whoever finds QEMU so shall know whose work it is
        try:
            self._saver.begin()
        except BaseException:
            self._saving = False
            raise
        self._in_pause = self._saver.parks

    def end_save(self) -> int:
        """Wait until the device state is in `state_fd`; its bytes, 0 if none was asked for."""
        if not self._saving or self._saver is None:
            return 0
        self._saving = False
        return self._saver.finish()

    def let_go(self) -> None:
        """Leave QEMU as it was found, if it is there, with everything said that it wanted to say."""
        try:
            if self._entered:
                # Of a QEMU that is gone nothing may leave: its guest goes on elsewhere, from where it was released.
                self.monitor.execute("query-status")
                self._open_gate()
                try:
                    self._remove_gate()
                finally:
                    self.go()
                self._chardevs.forget()
            if self._saver is not None:  # last: QEMU closes our file at once only while the guest runs
                self._saver.leave()
                self._stopped[16] = _FREE
        except CkptdError:
            pass  # it is gone
        finally:
            self.close()

    def _open_gate(self) -> None:
        """Most of what is held leaves while the guest runs: only then does QEMU take any number of packets."""
        with suppress(GuestError):
            self.holder.open()
        self.go()
        until = time.monotonic() + _LET_GO
        if self.running and self.holder.leaving_bytes > _LITTLE:
            time.sleep(_SETTLE)
        while self.running and self.holder.leaving_bytes > _LITTLE and time.monotonic() < until:
            time.sleep(0.001)
            self.events()

    def _remove_gate(self) -> None:
        self.stop()
        with suppress(GuestError):
            self._say_all()
        until = time.monotonic() + _LET_GO
        with suppress(GuestError):
            while not self.holder.drained() and time.monotonic() < until:
                time.sleep(0.001)
        filters.remove(self.monitor)
        self._remove_chardevs()

    def _remove_chardevs(self) -> None:
        if not self._chardevs.leave():
            self.go()
            if not self._chardevs.leave():
                print("the guest stands, so a chardev's output is dropped from here on", file=sys.stderr, flush=True)
            self.stop()
        with suppress(OSError, GuestError):
            self._chardevs.finish()

    def close(self) -> None:
        self.holder.close()
        self.monitor.close()
        if self._saver is not None:
            self._saver.close()
        for fd in (self.pidfd, self.state_fd):
            if fd >= 0:
                os.close(fd)
        self.pidfd = self.state_fd = -1


def _stamp(event: Event) -> int:
    at = event.get("timestamp", {})
    return int(at.get("seconds", 0)) * 1_000_000 + int(at.get("microseconds", 0))


def stands_for_us(runtime: Path, pid: int) -> bool:
    """That QEMU was stopped by a keeper in `runtime`, which was killed before it let the guest go on."""
    return _found(runtime, pid, _FOR_US)


def stands_as_saved(runtime: Path, pid: int) -> bool:
    """Somebody else has stopped that QEMU, and a keeper in `runtime` has saved it, which shows in its run state."""
    return _found(runtime, pid, _AS_SAVED)


def _found(runtime: Path, pid: int, what: int) -> bool:
    try:
        return _says((runtime / STOPPED_FILE).read_bytes()[:17], _run_of(pid), what)
    except OSError:
        return False


def _says(stopped: bytes, run: bytes, what: int) -> bool:
    return stopped == run + bytes([what])


def _run_of(pid: int) -> bytes:
    """16 bytes that only this run of this process has."""
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return xxhash.xxh3_128_digest(f"{boot} {pid} {started}".encode())
