"""A guest that stands still: memory of the bench's own, nothing dirty, nothing said.

For measuring the first image alone.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ckptd.guests.base import Memory
from ckptd.memory.dirtyset import DirtySet, Gfns
from ckptd.memory.regions import Geometry

__all__ = ["StillGuest"]


class _NoLog:
    """Nothing is ever written, so nothing is ever dirty: exact."""

    name, exact, needs_pause = "still", True, False

    def __init__(self, regions: int) -> None:
        self._regions = regions

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def restore(self, dirty: DirtySet) -> None: ...

    def harvest(self) -> DirtySet:
        return DirtySet.empty(self._regions)


class _NoGate:
    written = released = 0
    full = False

    def mark(self) -> int:
        return 0

    def held(self, mark: int) -> bytes:
        return b""

    def release(self, mark: int) -> int:
        return 0


class StillGuest:
    """Implements Guest over memory that it is given."""

    kind, vcpus, opens_at_detach, copies_early = "sim", 1, False, False

    def __init__(self, name: str, geometry: Geometry, memory: Memory) -> None:
        self.name, self.geometry, self.memory = name, geometry, memory
        self.run = bytes(16)
        self.tracker = _NoLog(len(geometry))
        self.gate = _NoGate()

    async def attach(self) -> None: ...
    async def pause(self) -> None: ...
    async def resume(self) -> None: ...
    def late(self) -> None: ...
    async def detach(self) -> None: ...
    async def end(self) -> None: ...

    async def save_state(self, *, go_on: bool = False) -> bytes:
        return b""

    def read_pages(self, region: int, gfns: Gfns, out: npt.NDArray[np.uint8]) -> None:
        np.take(self.memory[region], gfns, axis=0, out=out, mode="clip")

    def attention(self) -> int | None:
        return None

    def clear_attention(self) -> None: ...

    def alive(self) -> bool:
        return True

    def facts(self) -> dict[str, object]:
        return {}
