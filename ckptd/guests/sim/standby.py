"""SimStandby: a guest process that has imported everything and waits for the image, the state and an open gate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ckptd.errors import GuestError, StateError
from ckptd.guests.sim.gate import RECORD_SIZE, SimGate, gate_bytes
from ckptd.guests.sim.link import GuestLink
from ckptd.guests.sim.machine import header_of
from ckptd.guests.sim.shared import ControlPage, make_file, map_file
from ckptd.memory.regions import Geometry

__all__ = ["SimStandby"]

_GATE_CAPACITY = 1 << 20


class SimStandby:
    """The side that takes over. The guest, once active, outlives this object and its daemon."""

    kind = "sim"

    def __init__(self, name: str, runtime: Path, output: Path | None = None) -> None:
        self.name = name
        self._runtime = runtime
        self._output = output
        self._link: GuestLink | None = None
        self._page: ControlPage | None = None

    @property
    def active(self) -> bool:
        """The guest runs on this side (perhaps since before this daemon began)."""
        return self._link is not None and self._link.active

    async def prepare(self) -> None:
        if self._link is None:
            self._link = await GuestLink.open(self._runtime)
            self._page = ControlPage(map_file(self._link.page_fd))

    async def activate(
        self, geometry: Geometry, images: Sequence[int], state: bytes, held: bytes, released: int
    ) -> None:
        if self.active:
            raise StateError("the guest runs on this side already", guest=self.name)
        params, _, outputs = header_of(state)
        if params.geometry != geometry:
            raise GuestError(f"the state is of a guest of {params.geometry}, the image of {geometry}", guest=self.name)
        await self.prepare()
        assert self._link is not None
        gate_fd = make_file("ckptd-gate", gate_bytes(max(_GATE_CAPACITY, len(held) + RECORD_SIZE)))
        try:
            gate = SimGate(map_file(gate_fd), self._output)
            gate.fill(held, released)
            if gate.written != outputs:
                raise GuestError(f"the state has emitted {outputs} outputs, the gate {gate.written}", guest=self.name)
            gate.release(gate.written)
            output = None if self._output is None else str(self._output)
            await self._link.ask_soon({"op": "activate", "state": state, "output": output}, [gate_fd, *images])
            self._link.active = True
        finally:
            os.close(gate_fd)

    async def end(self) -> None:
        if self._link is not None:
            link, self._link = self._link, None
            await link.end()

    async def detach(self) -> None:
        """Leave the guest running if it is active; a process that only waits ends by itself."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def alive(self) -> bool:
        return self._link is not None and self._link.alive()

    def facts(self) -> dict[str, object]:
        if self._link is None or self._page is None:
            return {"prepared": False, "active": False}
        return {"prepared": True, "active": self.active, "pid": self._link.pid, "steps": self._page.step}
