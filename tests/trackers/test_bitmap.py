"""What only the bitmap has: no capacity, one place for each page, and a size by the geometry."""

from __future__ import annotations

import numpy as np
import pytest

from ckptd.errors import TrackerError
from ckptd.memory.dirtyset import DirtySet
from ckptd.memory.regions import Geometry
from ckptd.trackers.bitmap import BitmapLog, BitmapTracker, bitmap_log_bytes

GEOMETRY = Geometry.of(odd=70, ram=1 << 16)


def make() -> tuple[BitmapTracker, BitmapLog]:
    buffer = np.zeros(bitmap_log_bytes(GEOMETRY), dtype=np.uint8)
    return BitmapTracker(GEOMETRY, buffer), BitmapLog(GEOMETRY, buffer)


def test_takes_one_bit_for_each_page_and_a_line() -> None:
    assert bitmap_log_bytes(GEOMETRY) == 64 + 64 + (1 << 16) // 8


def test_a_buffer_too_small_is_refused() -> None:
    with pytest.raises(TrackerError, match="bytes"):
        BitmapTracker(GEOMETRY, np.zeros(64, dtype=np.uint8))


def test_every_page_many_times_is_never_too_much() -> None:
    tracker, log = make()
    tracker.start()
    for _ in range(3):
        for region, one in enumerate(GEOMETRY):
            assert log.mark(0, region, np.arange(one.pages)) == 0
    assert not log.full
    assert tracker.harvest() == DirtySet.everything(GEOMETRY)


def test_two_pages_of_one_word_in_one_batch() -> None:
    tracker, log = make()
    tracker.start()
    log.mark(0, 1, np.array([64, 127, 65, 64]))
    assert tracker.harvest().gfns[1].tolist() == [64, 65, 127]


def test_a_log_that_was_disarmed_does_not_pretend() -> None:
    tracker, log = make()
    tracker.start()
    log.disarm()
    log.mark(0, 0, np.array([1]))
    with pytest.raises(TrackerError, match="not started"):
        tracker.harvest()
