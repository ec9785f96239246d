"""QemuGuest: the daemon's view of a guest in a QEMU that runs anyway. Memory is QEMU's, or read out of it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ckptd.errors import GuestError, StateError
from ckptd.guests.base import Memory
from ckptd.guests.process.guest import Attached, ProcessGuest
from ckptd.guests.process.link import GuestLink
from ckptd.guests.process.remote import RemoteTracker
from ckptd.guests.process.shared import map_file, read_file
from ckptd.guests.qemu.gate import QemuGate
from ckptd.guests.qemu.qmp import Monitor
from ckptd.guests.qemu.ram import PrivateRam, backends_of, geometry_of, map_backing
from ckptd.guests.qemu.refusals import run_state
from ckptd.guests.qemu.spec import QemuSpec
from ckptd.guests.qemu.state import described, encode
from ckptd.guests.qemu.survey import Survey
from ckptd.guests.qemu.vm import stands_as_saved, stands_for_us
from ckptd.memory.dirtyset import DirtySet, Gfns
from ckptd.memory.regions import Geometry
from ckptd.trackers.base import Tracker
from ckptd.units import PAGE_SIZE

__all__ = ["QemuGuest"]

_AGAIN = 0.5  # seconds between two looks at a QEMU that is not ready


class QemuGuest(ProcessGuest[QemuSpec, QemuGate]):
    """`tracker`: "auto", "pagemap" or "soft-dirty". Its geometry is known once it is attached."""

    kind = "qemu"
    copies_early = True
    opens_at_detach = True  # the VM was there before us, and its network flows when we are gone
    module = "ckptd.guests.qemu.process"

    def __init__(
        self, name: str, params: QemuSpec, runtime: Path, *, tracker: str = "auto", gate_capacity: int = 64 << 20
    ) -> None:
        super().__init__(name, params, runtime, gate_capacity=gate_capacity, output=None)
        self._tracker_name = tracker
        self._survey: Survey | None = None
        self._about, self._way = b"", ""
        self._state_fd = self._wake_fd = self._said_fd = -1
        self._late: DirtySet | None = None
        self._went_on = False  # the guest runs again, before `resume`
        self._qemu_pid = 0
        self._waits_for = ""

    @property
    def survey(self) -> Survey:
        """What this QEMU is."""
        if self._survey is None:
            raise StateError("the guest is not attached", guest=self.name)
        return self._survey

    @property
    def geometry(self) -> Geometry:
        return geometry_of(self.survey)

    @property
    def vcpus(self) -> int:
        return self._survey.cpus if self._survey is not None else 0

    async def attach(self) -> None:
        """Waits while QEMU is in a state that passes by itself. Raises GuestError."""
        while why := await asyncio.to_thread(self._passing):
            self._waits_for = why
            await asyncio.sleep(_AGAIN)
        self._waits_for = ""
        await super().attach()

    def _passing(self) -> str:
        """What is waited for, in words; empty if nothing is."""
        if (self._runtime / "guest.sock").exists():  # a keeper has the monitor already, or has left its socket
            return ""
        monitor = Monitor(self.params.qmp)
        try:
            status = monitor.execute("query-status")["status"]
            if status in ("paused", "postmigrate", "finish-migrate"):
                if stands_for_us(self._runtime, monitor.peer_pid):
                    return ""
                if stands_as_saved(self._runtime, monitor.peer_pid):
                    status = "paused"
            state = run_state(status)
        finally:
            monitor.close()
        return state.why if state.verdict == "wait" else ""

    def _log(self) -> dict[str, Any]:
        return {"tracker": self._tracker_name}

    def _parts(self, link: GuestLink, reply: dict[str, Any], fds: list[int]) -> tuple[QemuGate, Tracker, Memory]:
        head, wake, state, exchange, said, about, *backing = fds
        self._close_fds()
        self._about = read_file(about)
        self._way, survey = described(self._about)
        self._survey = survey
        self._state_fd, self._wake_fd, self._said_fd = os.dup(state), os.dup(wake), os.dup(said)
        self._qemu_pid = int(reply["qemu"])
        memory: list[Any] = []
        for one, is_mapped in zip(backends_of(survey), reply["mapped"], strict=True):
            if is_mapped:
                memory.append(map_backing(backing.pop(0), one))
            else:
                assert one.address is not None
                memory.append(PrivateRam(self._qemu_pid, one.address, one.size // PAGE_SIZE, one.id))
        gate = QemuGate(map_file(head), self._wake_fd, [label for label, _ in self.params.chardevs])
        # A disk that is read past the page cache counts as a write when the read begins, and its data comes later: only
        # `stop`, which waits for what disks have under way, leaves nothing of that to be missed.
        drained = reply["needs_pause"] or any(one.inserted for one in survey.disks)
        tracker = RemoteTracker(reply["tracker"], link, map_file(exchange, writable=False), needs_pause=drained)
        return gate, tracker, cast(Memory, memory)

    async def pause(self) -> None:
        now = self._now
        if now.paused:
            raise StateError("the guest is paused already", guest=self.name)
        reply, _ = await now.link.ask_soon({"op": "pause", "since": now.gate.heard})
        now.paused = True
        now.gate.marked, self._late, self._went_on = reply["mark"], None, False
        if reply["said"]:
            now.gate.hear(os.pread(self._said_fd, reply["said"], 0))
        if "counts" in reply:
            cast(RemoteTracker, now.tracker).taken(reply)

    async def save_state(self, *, go_on: bool = False) -> bytes:
        """Raises GuestError if somebody else let the guest go on meanwhile."""
        now = self._now
        if not now.paused:
            raise StateError("the state is saved while the guest is paused", guest=self.name)
        reply, _ = await now.link.ask_soon({"op": "save", "go_on": go_on})
        self._went_on = reply["went_on"]
        self._late = cast(RemoteTracker, now.tracker).found(reply)
        return encode(self._about, os.pread(self._state_fd, reply["bytes"], 0))

    def late(self) -> DirtySet | None:
        return self._late

    async def resume(self) -> None:
        now = self._now
        if not now.paused:
            raise StateError("the guest is not paused", guest=self.name)
        now.paused = False
        if not self._went_on:
            await now.link.ask_soon({"op": "resume"})  # a pause lasts until QEMU has let the guest go on

    def read_pages(self, region: int, gfns: Gfns, out: npt.NDArray[np.uint8]) -> None:
        memory: object = self._now.memory[region]
        if isinstance(memory, PrivateRam):
            memory.read_pages(gfns, out)
        else:
            super().read_pages(region, gfns, out)

    async def detach(self) -> None:
        """Let go of what it has said, and leave nothing in QEMU. The guest goes on, unprotected."""
        await self._end("end")

    async def end(self) -> None:
        """QEMU quits."""
        await self._end("quit")

    async def _end(self, how: str) -> None:
        if self._attached is None:
            return
        attached, self._attached = self._attached, None
        try:
            await attached.link.ask_soon({"op": how})
        except GuestError:
            if not await attached.link.ends_soon():  # QEMU has ended, and with it the keeper: there is nothing to leave
                raise
        finally:
            await attached.link.end()
            attached.close()
            self._close_fds()

    def _close_fds(self) -> None:
        for fd in (self._state_fd, self._wake_fd, self._said_fd):
            if fd >= 0:
                os.close(fd)
        self._state_fd = self._wake_fd = self._said_fd = -1

    def _facts(self, now: Attached[QemuGate] | None) -> dict[str, object]:
        facts: dict[str, object] = {"qmp": str(self.params.qmp)}
        if self._waits_for:
            facts["waits_for"] = self._waits_for
        if now is not None and self._survey is not None:
            facts |= {
                "qemu": self._survey.version, "machine": self._survey.machine, "qemu_pid": self._qemu_pid,
                "netdevs": [one.id for one in self._survey.netdevs], "held_bytes": now.gate.held_bytes,
                "saves_by": self._way, "chardevs": [label for label, _ in self.params.chardevs],
                "note": now.page.note,
            }  # fmt: skip
        return facts
