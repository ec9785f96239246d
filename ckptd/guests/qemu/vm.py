"""A QEMU that is attached to, as its keeper has it: stopped, saved and let go on, and left as it was found.

Others may stop it or let it go on at any time; QEMU's events tell. What they have stopped stays stopped. What the
keeper itself has stopped is written down where the next keeper finds it, so that a guest does not stand for ever
because its keeper was killed in a pause.
"""

from __future__ import annotations

import asyncio
import os
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
from ckptd.guests.qemu.gate import Holder
from ckptd.guests.qemu.qmp import Event, Monitor, QmpError
from ckptd.guests.qemu.ram import geometry_of
from ckptd.guests.qemu.refusals import refusals, run_state
from ckptd.guests.qemu.spec import QemuSpec
from ckptd.guests.qemu.survey import Survey
from ckptd.guests.qemu.surveyor import survey
from ckptd.memory.regions import Geometry

__all__ = ["STOPPED_BYTES", "STOPPED_FILE", "Vm", "stands_for_us"]

STOPPED_FILE, STOPPED_BYTES = "guest.stopped", 4096
"""Of the file that says what the keeper has stopped: 16 bytes of the run, and 1 if that stands for our sake."""

_LET_GO = 4.0  # seconds for QEMU to take what is released at the end
_LITTLE = 1 << 16  # bytes that it takes at once
_SETTLE = 0.2  # seconds for its netdev to take much: what that has not taken at a stop QEMU throws away
_SAVE = "xen-save-devices-state"
_OPAQUE = "ckptd"  # by which our descriptors are known in QEMU


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

    `head` and `notice` are the gate's; `stopped` is the memory of what was stopped.
    """

    def __init__(
        self, spec: QemuSpec, capacity: int, head: npt.NDArray[np.uint8], notice: int, stopped: npt.NDArray[np.uint8]
    ) -> None:
        self.monitor = Monitor(spec.qmp)
        self.pidfd = self.state_fd = self._position = self._fdset = -1
        self.running = self.own_stop = False  # the latter: the guest stands because we have stopped it
        self.meddled = False  # somebody else has made it run, or reset it, since the last `pause`
        self._saving = 0
        self._entered = False  # filters of ours are in QEMU
        self._asked_at = 0  # when we asked for the last stop; microseconds, as QEMU has them
        self._end = ""
        self._because: str | None = None
        self._stopped = stopped
        self.holder = Holder(head, capacity, lambda: os.eventfd_write(notice, 1))
        try:
            self.pid = self.monitor.peer_pid
            self.pidfd = os.pidfd_open(self.pid)
            found = asyncio.run(survey(_Asking(self.monitor), self.pid))
            others = (one for one in found.chardevs if not filters.is_ours(one.label))
            self.survey: Survey = replace(found, chardevs=tuple(others))
            if why := refusals(self.survey, disks=spec.disks, ignore_blocks=spec.ignore_ram):
                raise GuestError("this QEMU cannot be protected: " + "; ".join(why), pid=self.pid)
            if _SAVE not in self.survey.commands:
                raise GuestError(f"this QEMU ({self.survey.version}) has no {_SAVE}", hint="use QEMU 7.2 or newer")
            self.geometry: Geometry = geometry_of(self.survey)
            self.run = _run_of(self.pid)
            self.running = self.survey.status == "running"
            self._remember()
            self._enter()
        except BaseException:
            self.let_go()
            raise

    def _remember(self) -> None:
        """Did a keeper that was killed stop it?"""
        if self.survey.status == "paused" and _says(self._stopped[:17].tobytes(), self.run):
            self.own_stop = True
        self._stopped[16] = self.own_stop
        self._stopped[:16] = np.frombuffer(self.run, dtype=np.uint8)

    def _enter(self) -> None:
        left = self.monitor.execute("query-fdsets")
        self.state_fd = make_file("ckptd-state", 0)
        # QEMU opens it for writing only, and so must we.
        self._position = os.open(f"/proc/self/fd/{self.state_fd}", os.O_WRONLY | os.O_CLOEXEC)
        self._fdset = int(self.monitor.execute("add-fd", {"opaque": _OPAQUE}, [self._position])["fdset-id"])
        self.stop()  # a filter of a keeper that was killed still keeps packets back: until ours are there
        self._entered = True
        filters.remove(self.monitor)
        for lane in filters.insert(self.monitor, [one.id for one in self.survey.netdevs]):
            self.holder.add(*lane)
        self.go()
        for one in left:  # by a keeper that was killed; QEMU closes it at once only while the guest runs
            if one["fds"] and all(fd.get("opaque") == _OPAQUE for fd in one["fds"]):
                self.monitor.execute("remove-fd", {"fdset-id": one["fdset-id"]})

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
                        self._stopped[16] = 0
                case "RESUME":
                    self.running = self.meddled = True
                    self._because = ""
                    self.holder.go()
                case "RESET":
                    self.meddled = True
                case "SHUTDOWN":
                    self._end = str(event.get("data", {}).get("reason", ""))

    def ended(self) -> GuestError:
        """The error that says so."""
        return GuestError("QEMU has ended" + (f": {self._end}" if self._end else ""), pid=self.pid)

    def stands_because(self) -> str:
        """Why the guest stands, if not for our sake; empty if it runs."""
        if self.running or self.own_stop:
            return ""
        if self._because is None:
            status = self.monitor.execute("query-status")["status"]
            try:
                self._because = str(run_state(status))
            except GuestError as error:
                self._because = error.message
        return self._because

    def pause(self) -> None:
        """`stop`, from which on `meddled` tells whether it lasts; and QEMU saves its devices next: see `end_save`."""
        self.events()
        self.meddled = False
        number = self._begin_stop() if self.running else 0
        self._begin_save()  # asked for together: between the two QEMU does not wait for us, nor for a CPU
        if number:
            self.monitor.finish("stop", number)
            self.events()

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
        if self.own_stop:
            self.own_stop = False
            self.monitor.execute("cont")
            self._stopped[16] = 0
            self.running = True  # unless an event says that somebody has stopped it since
            self.holder.go()
            self.events()

    def _begin_save(self) -> None:
        self.end_save()
        os.ftruncate(self.state_fd, 0)
        os.lseek(self._position, 0, os.SEEK_SET)  # QEMU's descriptor is a copy of this one, and shares its place
        self._saving = self.monitor.begin(_SAVE, {"filename": f"/dev/fdset/{self._fdset}", "live": False})

    def end_save(self) -> int:
        """Wait until the device state is in `state_fd`; its bytes, 0 if none was asked for."""
        if not self._saving:
            return 0
        number, self._saving = self._saving, 0
        self.monitor.finish(_SAVE, number)
        size = os.fstat(self.state_fd).st_size
        if not size:
            raise GuestError("QEMU has saved no device state")
        return size

    def let_go(self) -> None:
        """Leave QEMU as it was found, if it is there, with everything said that it wanted to say."""
        try:
            if self._entered:
                self._open_gate()
                try:
                    self._remove_gate()
                finally:
                    self.go()
            if self._fdset >= 0:  # last: QEMU closes it at once only while the guest runs
                self.monitor.execute("remove-fd", {"fdset-id": self._fdset})
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
        until = time.monotonic() + _LET_GO
        with suppress(GuestError):
            while not self.holder.drained() and time.monotonic() < until:
                time.sleep(0.001)
        filters.remove(self.monitor)

    def close(self) -> None:
        self.holder.close()
        self.monitor.close()
        for fd in (self.pidfd, self.state_fd, self._position):
            if fd >= 0:
                os.close(fd)
        self.pidfd = self.state_fd = self._position = -1


def _stamp(event: Event) -> int:
    at = event.get("timestamp", {})
    return int(at.get("seconds", 0)) * 1_000_000 + int(at.get("microseconds", 0))


def stands_for_us(runtime: Path, pid: int) -> bool:
    """That QEMU was stopped by a keeper in `runtime`, which was killed before it let the guest go on."""
    try:
        return _says((runtime / STOPPED_FILE).read_bytes()[:17], _run_of(pid))
    except OSError:
        return False


def _says(stopped: bytes, run: bytes) -> bool:
    return stopped == run + b"\1"


def _run_of(pid: int) -> bytes:
    """16 bytes that only this run of this process has."""
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return xxhash.xxh3_128_digest(f"{boot} {pid} {started}".encode())
