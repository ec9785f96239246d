"""The stage: where an epoch's pages are copied aside, so that the guest can go on before they are sent.

Pages may be copied more than once in an epoch, each time after a harvest that named them: what was copied from the
running guest is made right while it is paused, and once more by what its devices wrote as they were saved. A page that
no later harvest names was not written since, so its copy is whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ckptd.guests.base import Guest
from ckptd.memory.dirtyset import DirtySet, Gfns
from ckptd.memory.hashing import Rows
from ckptd.units import PAGE_SIZE

__all__ = ["Stage"]


class Stage:
    """Room for so many pages, made once. Holds the pages of one epoch in parts: a region, gfns, and where they are."""

    def __init__(self, size_bytes: int) -> None:
        self._rows: Rows = np.zeros((max(1, size_bytes // PAGE_SIZE), PAGE_SIZE), dtype=np.uint8)
        self._parts: list[tuple[int, Gfns, int]] = []
        self._used = 0

    @property
    def capacity(self) -> int:
        """Pages that fit."""
        return len(self._rows)

    @property
    def pages(self) -> int:
        """Pages that are in it."""
        return self._used

    def clear(self) -> None:
        """Hold nothing."""
        self._parts, self._used = [], 0

    def copy(self, guest: Guest, dirty: DirtySet) -> None:
        """Copy these pages of the guest, over what is here of them already. What is new must fit."""
        for region, gfns in enumerate(dirty.gfns):
            for other, known, start in self._parts if len(gfns) else ():
                if other == region:
                    gfns = self._over(guest, region, gfns, known, start)
            if len(gfns):
                guest.read_pages(region, gfns, self._rows[self._used : self._used + len(gfns)])
                self._parts.append((region, gfns, self._used))
                self._used += len(gfns)

    def batches(self, most: int) -> Iterator[tuple[int, Gfns, Rows]]:
        """Region, gfns and pages, at most so many at a time, in ascending order. No page is in two of them."""
        for region in sorted({region for region, _, _ in self._parts}):
            parts = [(gfns, start) for other, gfns, start in self._parts if other == region]
            if len(parts) == 1:
                gfns, start = parts[0]
                for at in range(0, len(gfns), most):
                    part = gfns[at : at + most]
                    yield region, part, self._rows[start + at : start + at + len(part)]
                continue
            gfns = np.concatenate([gfns for gfns, _ in parts])
            where = np.concatenate([np.arange(start, start + len(gfns)) for gfns, start in parts])
            order = gfns.argsort(kind="stable")
            gfns, where = gfns[order], where[order]
            for at in range(0, len(gfns), most):  # copied once more, but not in the pause
                yield region, gfns[at : at + most], self._rows[where[at : at + most]]

    def _over(self, guest: Guest, region: int, gfns: Gfns, known: Gfns, start: int) -> Gfns:
        """Copy those that are known again; returns the others."""
        place = known.searchsorted(gfns)
        again = known[np.minimum(place, len(known) - 1)] == gfns
        if again.any():
            fresh = np.empty((int(np.count_nonzero(again)), PAGE_SIZE), dtype=np.uint8)
            guest.read_pages(region, gfns[again], fresh)
            self._rows[start + place[again]] = fresh
        others: Gfns = gfns[~again]
        return others
