"""ProcessStandby: a guest process that has imported everything and waits for the image, the state and an open gate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from ckptd.errors import GuestError, StateError
from ckptd.guests.base import Still
from ckptd.guests.process.link import GuestLink
from ckptd.guests.process.shared import ControlPage, make_file, map_file
from ckptd.memory.regions import Geometry

__all__ = ["ProcessStandby"]


class ProcessStandby:
    """The side that takes over. The guest, once active, outlives this object and its daemon."""

    kind: ClassVar[str]
    module: ClassVar[str]
    """What `python -m` runs as the guest's process."""

    def __init__(self, name: str, runtime: Path, output: Path | None = None) -> None:
        self.name = name
        self._runtime = runtime
        self._output = output
        self._link: GuestLink | None = None
        self._page: ControlPage | None = None

    def _open_gate(self, geometry: Geometry, state: bytes, held: bytes, released: int) -> int:
        """A descriptor of a gate that has let go of everything in `held`. Raises GuestError if the parts do not fit."""
        raise NotImplementedError

    @property
    def active(self) -> bool:
        """The guest runs on this side (perhaps since before this daemon began)."""
        return self._link is not None and self._link.active

    async def prepare(self) -> None:
        if self._link is None:
            self._link = await GuestLink.open(self._runtime, self.module)
            self._page = ControlPage(map_file(self._link.page_fd))

    async def fit(self, geometry: Geometry, images: Sequence[int], state: bytes, still: Still) -> str:
        return ""

    async def activate(
        self, geometry: Geometry, images: Sequence[int], state: bytes, held: bytes, released: int
    ) -> None:
        if self.active:
            raise StateError("the guest runs on this side already", guest=self.name)
        await self.prepare()
        assert self._link is not None
        state_fd = make_file("ckptd-state", len(state))
        gate_fd = -1
        try:
            os.pwrite(state_fd, state, 0)
            gate_fd = self._open_gate(geometry, state, held, released)
            output = None if self._output is None else str(self._output)
            await self._link.ask_soon({"op": "activate", "output": output}, [state_fd, gate_fd, *images])
            self._link.active = True
        finally:
            for fd in (state_fd, gate_fd):
                if fd >= 0:
                    os.close(fd)

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


def refuse_other_geometry(found: Geometry, wanted: Geometry, name: str) -> None:
    """Raises GuestError unless the state is of a guest of this geometry."""
    if found != wanted:
        raise GuestError(f"the state is of a guest of {found}, the image of {wanted}", guest=name)


def refuse_other_outputs(emitted: int, in_gate: int, name: str) -> None:
    """Raises GuestError unless state and gate belong to the same moment."""
    if emitted != in_gate:
        raise GuestError(f"the state has emitted {emitted} outputs, the gate {in_gate}", guest=name)
