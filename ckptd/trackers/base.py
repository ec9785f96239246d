"""What a tracker is: the side of a dirty log that takes. And what a log is: the side that marks, in the guest.

Rules for every tracker (tests/trackers/contract.py checks them):

- a page written between two harvests is in the second, or the second says `overflowed`: nothing is ever lost
silently; - contents are read only after harvest returned: a page written meanwhile is then in the next harvest, never
in none; - `restore` puts back what could not be shipped, and the next harvest reports it again, `overflowed`
included.

A tracker never reads the pages themselves, and does not know where they go.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from ckptd.memory.dirtyset import DirtySet, Gfns

__all__ = ["Buffer", "Log", "Tracker"]

Buffer = npt.NDArray[np.uint8]
"""Memory that both sides of a log map: flat, aligned to 64 bytes, zero at first."""


class Tracker(Protocol):
    """Takes the dirty set of a guest. Not thread-safe: one harvester."""

    @property
    def name(self) -> str:
        """What the configuration and the metrics call this design."""

    @property
    def exact(self) -> bool:
        """True: a harvest is just the written pages. False: it may hold more."""

    @property
    def needs_pause(self) -> bool:
        """True: harvest only while the guest is paused. False: at any time."""

    def start(self) -> None:
        """Begin logging, with the guest paused; everything logged before is dropped. Raises TrackerUnavailable."""

    def harvest(self) -> DirtySet:
        """Take and reset. Raises TrackerError if the log is not started or damaged."""

    def restore(self, dirty: DirtySet) -> None:
        """Put back what could not be shipped: the next harvest reports it again."""

    def stop(self) -> None:
        """End logging; what was logged is dropped. Does nothing when not started."""


class Log(Protocol):
    """Marks pages as dirty, on the guest's side of the same memory."""

    @property
    def full(self) -> bool:
        """The guest must not write before somebody has harvested."""

    def mark(self, vcpu: int, region: int, gfns: Gfns) -> int:
        """Log pages that the vCPU *has* written, any order and repetition; returns how many did not fit."""

    def disarm(self) -> None:
        """Nobody harvests any more: stop logging."""
