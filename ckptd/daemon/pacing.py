"""When the next epoch ends: at a fixed interval, or as often as the link and the guest allow. Pure: the clock is passed
in.

Deadlines are absolute, so one slow epoch does not shift all that follow; deadlines that were missed are skipped, not
made up for. The adaptive interval aims at `target_lag`, the longest time from a store in the guest to its
acknowledgement: interval + commit time. Where a commit takes longer than the interval the link or the secondary pushes
back, and the interval grows quickly; else it shrinks slowly while the lag is above the target and grows slowly while
it is below, within min and max.
"""

from __future__ import annotations

__all__ = ["Pacer"]

_YIELD = 1.25
_GROW, _SHRINK = 1.04, 0.96


class Pacer:
    """All times in ns. A fixed interval is one whose `least` and `most` are the same."""

    def __init__(self, least: int, most: int, target_lag: int, now: int) -> None:
        self._least, self._most, self._target = least, most, target_lag
        self.interval = least
        self.deadline = now

    def set_limits(self, least: int, most: int, target_lag: int, now: int) -> None:
        """A changed configuration, at once: the next deadline is at most one new interval away."""
        self._least, self._most, self._target = least, most, target_lag
        self.interval = min(max(self.interval, least), most)
        self.deadline = min(self.deadline, now + self.interval)

    def started(self, now: int) -> None:
        """An epoch's checkpoint begins now; set the deadline of the next."""
        self.deadline += self.interval
        if self.deadline <= now:
            self.deadline = now + self.interval

    def acknowledged(self, commit_ns: int) -> None:
        """An epoch was acknowledged this long after its checkpoint began."""
        if self._least == self._most:
            return
        # A lag above the target is no reason to grow: that would make it longer still, up to max, for good.
        factor = _SHRINK if self.interval + commit_ns > self._target else _GROW
        if commit_ns > self.interval:
            factor = _YIELD
        self.interval = round(min(max(self.interval * factor, self._least), self._most))
