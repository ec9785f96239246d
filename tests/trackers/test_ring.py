"""What only the ring has: soft-full, overflow, wrap-around, a live harvest, and the rule of the last entry."""

from __future__ import annotations

import multiprocessing
from mmap import mmap

import numpy as np
import pytest

from ckptd.errors import ConfigError, TrackerError
from ckptd.memory.dirtyset import DirtySet
from ckptd.memory.regions import Geometry
from ckptd.trackers.base import Buffer
from ckptd.trackers.ring import RingLog, RingTracker, ring_log_bytes

GEOMETRY = Geometry.of(ram=4096, more=4096)
ENTRIES, RESERVE = 256, 32


def make(vcpus: int = 1, *, store_first: bool = True) -> tuple[RingTracker, RingLog, Buffer]:
    buffer = np.zeros(ring_log_bytes(vcpus, ENTRIES), dtype=np.uint8)
    tracker = RingTracker(GEOMETRY, vcpus, ENTRIES, buffer, store_first=store_first)
    tracker.start()
    return tracker, RingLog(vcpus, ENTRIES, RESERVE, buffer), buffer


def pages(start: int, end: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.arange(start, end, dtype=np.int64)


@pytest.mark.parametrize("entries", [0, 1, 3, 300])
def test_a_size_that_is_no_power_of_two_is_refused(entries: int) -> None:
    with pytest.raises(ConfigError, match="power of two"):
        ring_log_bytes(1, entries)


@pytest.mark.parametrize("reserve", [0, ENTRIES])
def test_a_reserve_must_fit_in_the_ring(reserve: int) -> None:
    with pytest.raises(ConfigError, match="reserve"):
        RingLog(1, ENTRIES, reserve, np.zeros(ring_log_bytes(1, ENTRIES), dtype=np.uint8))


def test_a_buffer_too_small_is_refused() -> None:
    with pytest.raises(TrackerError, match="bytes"):
        RingTracker(GEOMETRY, 2, ENTRIES, np.zeros(ring_log_bytes(1, ENTRIES), dtype=np.uint8))


def test_soft_full_begins_when_less_than_the_reserve_is_left() -> None:
    tracker, log, _ = make(vcpus=2)
    log.mark(1, 0, pages(0, ENTRIES - RESERVE))
    assert not log.full
    assert log.mark(1, 0, pages(0, 1)) == 0
    assert log.full
    tracker.harvest()
    assert not log.full


def test_the_reserve_is_used_and_nothing_is_lost() -> None:
    tracker, log, _ = make()
    log.mark(0, 0, pages(0, ENTRIES - RESERVE + 1))
    assert log.full
    assert log.mark(0, 1, pages(7, 7 + RESERVE - 1)) == 0
    assert tracker.harvest() == DirtySet([pages(0, ENTRIES - RESERVE + 1), pages(7, 7 + RESERVE - 1)])


def test_what_does_not_fit_is_counted_and_said_once() -> None:
    tracker, log, _ = make()
    assert log.mark(0, 0, pages(0, ENTRIES + 44)) == 44
    assert log.mark(0, 0, pages(0, 3)) == 3
    dirty = tracker.harvest()
    assert dirty.overflowed
    assert not tracker.harvest()


def test_an_overflow_from_before_start_is_dropped_too() -> None:
    tracker, log, _ = make()
    log.mark(0, 0, pages(0, ENTRIES + 1))
    tracker.start()
    assert not tracker.harvest()


def test_a_producer_that_overran_the_ring_is_found_out() -> None:
    """As seen with a real ring: the writer passes the soft limit and overwrites what nobody has harvested."""
    tracker, log, buffer = make()
    log.mark(0, 0, pages(0, 200))
    buffer.view(np.uint64)[0] += 100  # the marker says 300 entries in 256 places
    assert tracker.harvest().overflowed
    log.mark(0, 0, pages(5, 6))
    assert tracker.harvest() == DirtySet([pages(5, 6), pages(0, 0)])


def test_damaged_markers_are_an_error() -> None:
    tracker, log, buffer = make()
    log.mark(0, 0, pages(0, 10))
    tracker.harvest()
    buffer.view(np.uint64)[0] = 3
    with pytest.raises(TrackerError, match="markers"):
        tracker.harvest()


def test_an_entry_of_no_region_is_an_error() -> None:
    tracker, log, _ = make()
    log.mark(0, 9, pages(0, 1))
    with pytest.raises(TrackerError, match="region"):
        tracker.harvest()


def test_a_log_that_was_disarmed_does_not_pretend() -> None:
    """The guest disarms when its daemon is gone: pages are missing from then on, and a harvest must not hide that."""
    tracker, log, _ = make()
    log.disarm()
    log.mark(0, 0, pages(0, 500))
    assert not log.full
    with pytest.raises(TrackerError, match="not started"):
        tracker.harvest()


def test_a_store_that_comes_after_its_entry_is_not_lost() -> None:
    """The vCPU leaves on a full ring with its newest entry logged and the store to come, which is then not logged.

    Contents are copied right after each harvest, so the copy is right only if the page is reported again.
    """
    memory, copy = np.zeros(4096, dtype=np.int64), np.zeros(4096, dtype=np.int64)
    tracker, log, _ = make(store_first=False)

    def checkpoint() -> DirtySet:
        dirty = tracker.harvest()
        copy[dirty.gfns[0]] = memory[dirty.gfns[0]]
        return dirty

    log.mark(0, 0, pages(0, 8))
    memory[0:7] = 1
    assert 7 in checkpoint().gfns[0]
    assert 7 in checkpoint().gfns[0]  # nothing has shown yet that the store is done
    memory[7] = 1
    log.mark(0, 0, pages(20, 21))
    memory[20] = 1
    checkpoint()
    assert np.array_equal(copy, memory)
    log.mark(0, 0, pages(30, 31))
    assert checkpoint().gfns[0].tolist() == [20, 30]


def _produce(shared: mmap, batches: int) -> None:
    log = RingLog(1, ENTRIES, RESERVE, np.frombuffer(shared, dtype=np.uint8))
    for batch in range(batches):
        while log.full:
            pass
        log.mark(0, batch & 1, pages(batch * 7 % 4000, batch * 7 % 4000 + 7))


def test_a_harvest_while_the_other_process_writes_loses_nothing() -> None:
    shared = mmap(-1, ring_log_bytes(1, ENTRIES))
    tracker = RingTracker(GEOMETRY, 1, ENTRIES, np.frombuffer(shared, dtype=np.uint8))
    tracker.start()
    batches = 4000
    guest = multiprocessing.get_context("fork").Process(target=_produce, args=(shared, batches))
    guest.start()
    seen = np.zeros((2, 4096), dtype=bool)
    running = True
    try:
        while running:
            running = guest.is_alive()  # before the last harvest, which then has everything
            dirty = tracker.harvest()
            assert not dirty.overflowed
            for region, gfns in enumerate(dirty.gfns):
                seen[region, gfns] = True
    finally:
        guest.kill()
        guest.join()
    assert guest.exitcode == 0
    wanted = np.zeros((2, 4096), dtype=bool)
    for batch in range(batches):
        wanted[batch & 1, batch * 7 % 4000 : batch * 7 % 4000 + 7] = True
    assert np.array_equal(seen, wanted)
    written, harvested, reset = np.frombuffer(shared, dtype=np.uint64)[[0, 8, 16]]
    assert written == harvested == reset == 7 * batches
