"""RemoteTracker: a tracker that works in the guest's process, where alone its log can be taken.

A harvest is one question; the gfns come back through a file that both map, region after region, 8 bytes each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ckptd.guests.process.link import GuestLink
from ckptd.memory.dirtyset import DirtySet

__all__ = ["RemoteTracker", "leave"]


class RemoteTracker:
    """The daemon's side. `exchange`: where the process leaves the gfns of a harvest."""

    def __init__(
        self, name: str, link: GuestLink, exchange: npt.NDArray[np.uint8], *, needs_pause: bool = False
    ) -> None:
        self.name = name
        self.needs_pause = needs_pause
        self.exact = False
        self._link = link
        self._gfns = exchange[: len(exchange) // 8 * 8].view(np.int64)
        self._restored: DirtySet | None = None
        self._taken: DirtySet | None = None

    def start(self) -> None:
        self._link.ask({"op": "start"})
        self._restored = self._taken = None

    def harvest(self) -> DirtySet:
        dirty, self._taken = self._taken, None
        if dirty is None:
            reply, _ = self._link.ask({"op": "harvest"})
            dirty = self.found(reply)
        if self._restored is not None:
            dirty, self._restored = dirty.merge(self._restored), None
        return dirty

    def found(self, reply: dict[str, Any]) -> DirtySet:
        """The harvest that the process left with this reply."""
        gfns, at = [], 0
        for count in reply["counts"]:
            gfns.append(self._gfns[at : at + count].copy())
            at += count
        self.exact = reply["exact"]
        return DirtySet(gfns, reply["overflowed"])

    def taken(self, reply: dict[str, Any]) -> None:
        """A harvest came with another answer: it is that of the next `harvest`."""
        dirty = self.found(reply)
        self._taken = dirty if self._taken is None else self._taken.merge(dirty)

    def restore(self, dirty: DirtySet) -> None:
        self._restored = dirty if self._restored is None else self._restored.merge(dirty)

    def stop(self) -> None:
        self._link.ask({"op": "stop"})


def leave(dirty: DirtySet, exact: bool, exchange: npt.NDArray[np.uint8]) -> dict[str, Any]:
    """The process's side: leave a harvest in the exchange; returns the reply."""
    words, at = exchange[: len(exchange) // 8 * 8].view(np.int64), 0
    for gfns in dirty.gfns:
        words[at : at + len(gfns)] = gfns
        at += len(gfns)
    return {"counts": [len(gfns) for gfns in dirty.gfns], "overflowed": dirty.overflowed, "exact": exact}
