"""Which tracker follows the memory of a process from outside."""

from __future__ import annotations

from collections.abc import Sequence

from ckptd.errors import ConfigError, TrackerUnavailable
from ckptd.memory.regions import Geometry
from ckptd.trackers import soft_dirty, userfaultfd
from ckptd.trackers.base import Tracker
from ckptd.trackers.pagemap import PagemapTracker
from ckptd.trackers.soft_dirty import SoftDirtyTracker

__all__ = ["PROCESS_TRACKERS", "process_tracker"]

PROCESS_TRACKERS = ("auto", "pagemap", "soft-dirty")


def process_tracker(name: str, geometry: Geometry, pid: int, addresses: Sequence[int]) -> Tracker:
    """A tracker of these regions of that process, not started.

    "auto" takes pagemap, and soft-dirty only where the kernel itself lacks what pagemap needs. A missing permission is
    no reason to: start() then says which one, as it is worth giving. Raises TrackerUnavailable if neither can work
    here, ConfigError for another name.
    """
    if name not in PROCESS_TRACKERS:
        raise ConfigError(f"a tracker of a process is one of {', '.join(PROCESS_TRACKERS)}, not {name!r}")
    if name == "auto":
        lacks = userfaultfd.kernel_lacks()
        if lacks is None:
            name = "pagemap"
        elif (why := soft_dirty.self_test()) is not None:
            raise TrackerUnavailable(
                f"neither tracker works here: pagemap: {lacks.message}; soft-dirty: {why}", hint=lacks.hint
            )
        else:
            name = "soft-dirty"
    if name == "pagemap":
        return PagemapTracker(geometry, pid, addresses)
    return SoftDirtyTracker(geometry, pid, addresses)
