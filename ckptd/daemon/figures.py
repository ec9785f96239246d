"""Figures that a daemon keeps about itself: counters, and the last few thousand values of each duration."""

from __future__ import annotations

import numpy as np

__all__ = ["Recent"]


class Recent:
    """The last `size` values of one quantity, and the largest ever; percentiles on demand."""

    __slots__ = ("_count", "_values", "largest")

    def __init__(self, size: int = 4096) -> None:
        self._values = np.zeros(size)
        self._count = 0
        self.largest = 0.0

    def add(self, value: float) -> None:
        self._values[self._count % len(self._values)] = value
        self._count += 1
        self.largest = max(self.largest, value)

    @property
    def count(self) -> int:
        return self._count

    def summary(self) -> dict[str, float]:
        """{"p50", "p99", "max"}, in the unit of what was added; zeros when nothing was."""
        values = self._values[: min(self._count, len(self._values))]
        if not len(values):
            return {"p50": 0.0, "p99": 0.0, "max": 0.0}
        p50, p99 = np.percentile(values, (50, 99))
        return {"p50": round(float(p50), 3), "p99": round(float(p99), 3), "max": round(self.largest, 3)}
