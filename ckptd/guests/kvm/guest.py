"""KvmGuest: the daemon's view of a kvm guest. Memory and gate are shared; the dirty log is asked of the VMM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ckptd.guests.base import Memory
from ckptd.guests.kvm.gate import KvmGate
from ckptd.guests.kvm.spec import KvmSpec
from ckptd.guests.process.guest import Attached, ProcessGuest, mapped
from ckptd.guests.process.link import GuestLink
from ckptd.guests.process.remote import RemoteTracker
from ckptd.guests.process.shared import map_file
from ckptd.memory.regions import Geometry
from ckptd.trackers.base import Tracker

__all__ = ["KvmGuest"]


class KvmGuest(ProcessGuest[KvmSpec, KvmGate]):
    """`tracker`: "auto" or one of machine.TRACKERS."""

    kind = "kvm"
    module = "ckptd.guests.kvm.process"

    def __init__(
        self,
        name: str,
        params: KvmSpec,
        runtime: Path,
        *,
        tracker: str = "auto",
        ring_entries: int = 65536,
        gate_capacity: int = 1 << 20,
        output: Path | None = None,
    ) -> None:
        super().__init__(name, params, runtime, gate_capacity=gate_capacity, output=output)
        self._tracker_name = tracker
        self._ring_entries = ring_entries
        self._exchange = np.empty(0, dtype=np.uint8)

    @property
    def geometry(self) -> Geometry:
        return self.params.geometry

    @property
    def vcpus(self) -> int:
        return self.params.vcpus

    def _log(self) -> dict[str, Any]:
        return {"tracker": self._tracker_name, "ring_entries": self._ring_entries}

    def _parts(self, link: GuestLink, reply: dict[str, Any], fds: list[int]) -> tuple[KvmGate, Tracker, Memory]:
        gate_fd, exchange_fd, *memory_fds = fds
        self._exchange = map_file(exchange_fd, writable=False)
        gate = KvmGate(map_file(gate_fd), self._output, lambda: link.tell({"op": "released"}))
        return gate, RemoteTracker(reply["tracker"], link, self._exchange), mapped(memory_fds)

    async def _saved(self) -> bytes:
        reply, _ = await self._now.link.ask_soon({"op": "save"})
        return self._exchange[: reply["bytes"]].tobytes()

    async def pause_at_marks(self) -> None:
        """Pause with every vCPU right behind a mark, where its program's model says what it must be."""
        await self._now.link.ask_soon({"op": "pause at marks"})
        self._now.paused = True

    def _facts(self, now: Attached[KvmGate] | None) -> dict[str, object]:
        facts: dict[str, object] = {"program": self.params.program, "rate": self.params.rate}
        if now is not None:
            facts |= {"log_losses": now.page.losses, "note": now.page.note}
        return facts
