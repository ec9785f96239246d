"""SimGuest: starts the guest's process or finds it running, maps what it shares, and drives it.

The daemon reads guest memory through read-only mappings; harvest and release work on shared memory too, so between
pause and resume there is one packet each way.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ckptd.errors import GuestError, StateError
from ckptd.guests.base import Memory
from ckptd.guests.sim.gate import SimGate
from ckptd.guests.sim.link import GuestLink
from ckptd.guests.sim.machine import Params
from ckptd.guests.sim.shared import ControlPage, map_file
from ckptd.memory.dirtyset import Gfns
from ckptd.memory.regions import Geometry
from ckptd.trackers.base import Tracker
from ckptd.trackers.bitmap import BitmapTracker
from ckptd.trackers.ring import RingTracker
from ckptd.units import PAGE_SIZE

__all__ = ["SimGuest"]


class SimGuest:
    """One guest; `attach` before anything else. `tracker`: "bitmap" or "ring"."""

    kind = "sim"

    def __init__(
        self,
        name: str,
        params: Params,
        runtime: Path,
        *,
        tracker: str = "bitmap",
        ring_entries: int = 65536,
        gate_capacity: int = 1 << 20,
        output: Path | None = None,
    ) -> None:
        self.name = name
        self.params = params
        self._runtime = runtime
        self._tracker_name = tracker
        self._ring_entries = ring_entries
        self._gate_capacity = gate_capacity
        self._output = output
        self._attached: _Attached | None = None

    @property
    def geometry(self) -> Geometry:
        return self.params.geometry

    @property
    def vcpus(self) -> int:
        return self.params.vcpus

    @property
    def run(self) -> bytes:
        return self._now.run

    @property
    def tracker(self) -> Tracker:
        return self._now.tracker

    @property
    def gate(self) -> SimGate:
        return self._now.gate

    @property
    def memory(self) -> Memory:
        return self._now.memory

    @property
    def resumed(self) -> bool:
        """`attach` found the guest running; False: it began with `attach`."""
        return not self._now.link.started

    async def attach(self) -> None:
        if self._attached is not None:
            raise StateError("the guest is attached already", guest=self.name)
        link = await GuestLink.open(self._runtime)
        try:
            if not link.active:
                link.ask({"op": "create", "params": self.params.as_dict(), "gate_capacity": self._gate_capacity})
            log = {"tracker": self._tracker_name, "ring_entries": self._ring_entries}
            reply, fds = link.ask({"op": "attach", **log})
            try:
                self._check(Params.from_dict(reply["params"]))
                self._attached = self._map(link, fds)
                self._attached.run = reply["run"]
            finally:
                for fd in fds:
                    os.close(fd)
        except BaseException:
            if link.started:
                await link.end()
            link.close()
            raise

    async def pause(self) -> None:
        now = self._now
        if now.state is not None:
            raise StateError("the guest is paused already", guest=self.name)
        now.page.pause = True  # seen before the next step; the packet wakes it where it sleeps
        reply, _ = await now.link.ask_soon({"op": "pause"})
        now.state = reply["state"]

    async def save_state(self) -> bytes:
        if self._now.state is None:
            raise StateError("the state is saved while the guest is paused", guest=self.name)
        return self._now.state

    async def resume(self) -> None:
        now = self._now
        if now.state is None:
            raise StateError("the guest is not paused", guest=self.name)
        now.state = None
        now.page.pause = False
        now.link.tell({"op": "resume"})

    def read_pages(self, region: int, gfns: Gfns, out: npt.NDArray[np.uint8]) -> None:
        # mode="raise", the default, would gather into a buffer first
        np.take(self._now.memory[region], gfns, axis=0, out=out, mode="clip")

    def attention(self) -> int | None:
        return self._now.attention

    def clear_attention(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._now.attention)

    def alive(self) -> bool:
        return self._attached is not None and self._attached.link.alive()

    async def detach(self) -> None:
        if self._attached is not None:
            self._attached.close()
            self._attached = None

    async def end(self) -> None:
        if self._attached is not None:
            attached, self._attached = self._attached, None
            await attached.link.end()
            attached.close()

    def facts(self) -> dict[str, object]:
        if self._attached is None:
            return {"attached": False, "workload": self.params.workload}
        now = self._attached
        return {
            "attached": True,
            "pid": now.link.pid,
            "paused": now.state is not None,
            "steps": now.page.step,
            "outputs": now.gate.written,
            "released": now.gate.released,
            "workload": self.params.workload,
            "rate": self.params.rate,
            "tracker": now.tracker.name,
        }

    @property
    def _now(self) -> _Attached:
        if self._attached is None:
            raise StateError("the guest is not attached", guest=self.name)
        return self._attached

    def _check(self, running: Params) -> None:
        wanted, found = self.params.as_dict(), running.as_dict()
        different = [f"{key} {wanted[key]} and not {found[key]}" for key in wanted if wanted[key] != found[key]]
        if different:
            raise GuestError(
                f"the guest that runs in {self._runtime} is another one: wanted {', '.join(different)}",
                hint="end that guest, or change the configuration back",
                guest=self.name,
            )

    def _map(self, link: GuestLink, fds: list[int]) -> _Attached:
        gate_fd, log_fd, page_fd, attention, *memory_fds = fds
        log = map_file(log_fd)
        tracker: Tracker
        if self._tracker_name == "ring":
            tracker = RingTracker(self.geometry, self.vcpus, self._ring_entries, log)
        else:
            tracker = BitmapTracker(self.geometry, log)
        return _Attached(
            link=link,
            page=ControlPage(map_file(page_fd)),
            gate=SimGate(map_file(gate_fd), self._output),
            tracker=tracker,
            memory=[map_file(fd, writable=False).reshape(-1, PAGE_SIZE) for fd in memory_fds],
            attention=os.dup(attention),
        )


class _Attached:
    """All that exists only while attached."""

    def __init__(
        self, link: GuestLink, page: ControlPage, gate: SimGate, tracker: Tracker, memory: Memory, attention: int
    ) -> None:
        self.link = link
        self.page = page
        self.gate = gate
        self.tracker = tracker
        self.memory = memory
        self.attention = attention
        self.state: bytes | None = None
        self.run = b""

    def close(self) -> None:
        self.link.close()
        if self.attention >= 0:
            os.close(self.attention)
            self.attention = -1
