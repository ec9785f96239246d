"""SimGuest: the daemon's view of a sim guest. Harvest and release are plain accesses to shared memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ckptd.guests.base import Memory
from ckptd.guests.process.guest import Attached, ProcessGuest, mapped
from ckptd.guests.process.link import GuestLink
from ckptd.guests.process.shared import map_file
from ckptd.guests.sim.gate import SimGate
from ckptd.guests.sim.machine import Params
from ckptd.memory.regions import Geometry
from ckptd.trackers.base import Tracker
from ckptd.trackers.bitmap import BitmapTracker
from ckptd.trackers.ring import RingTracker

__all__ = ["SimGuest"]


class SimGuest(ProcessGuest[Params, SimGate]):
    """`tracker`: "bitmap" or "ring"."""

    kind = "sim"
    module = "ckptd.guests.sim.process"

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
        super().__init__(name, params, runtime, gate_capacity=gate_capacity, output=output)
        self._tracker_name = tracker
        self._ring_entries = ring_entries

    @property
    def geometry(self) -> Geometry:
        return self.params.geometry

    @property
    def vcpus(self) -> int:
        return self.params.vcpus

    def _log(self) -> dict[str, Any]:
        return {"tracker": self._tracker_name, "ring_entries": self._ring_entries}

    def _parts(self, link: GuestLink, reply: dict[str, Any], fds: list[int]) -> tuple[SimGate, Tracker, Memory]:
        gate_fd, log_fd, *memory_fds = fds
        log = map_file(log_fd)
        tracker: Tracker
        if self._tracker_name == "ring":
            tracker = RingTracker(self.geometry, self.vcpus, self._ring_entries, log)
        else:
            tracker = BitmapTracker(self.geometry, log)
        return SimGate(map_file(gate_fd), self._output), tracker, mapped(memory_fds)

    def _facts(self, now: Attached[SimGate] | None) -> dict[str, object]:
        return {"workload": self.params.workload, "rate": self.params.rate}
