"""The bitmap and the ring keep the contract of all trackers, and the contract rejects trackers that lose pages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis.errors import HypothesisException

from ckptd.memory.dirtyset import DirtySet, Gfns
from ckptd.memory.regions import Geometry
from ckptd.trackers.base import Log, Tracker
from ckptd.trackers.bitmap import BitmapLog, BitmapTracker, bitmap_log_bytes
from ckptd.trackers.ring import RingLog, RingTracker, ring_log_bytes

from .contract import CHECKS, Bench, Check, MakeBench

GEOMETRY = Geometry.of(low=130, ram=1000, rom=1)
VCPUS, ENTRIES = 3, 1024


@dataclass
class LogBench:
    """A bench whose guest is a call: log and tracker over one buffer."""

    tracker: Tracker
    log: Log
    capacity: int | None
    geometry: Geometry = GEOMETRY
    vcpus: int = VCPUS

    def write(self, vcpu: int, region: int, gfns: Gfns) -> None:
        self.log.mark(vcpu, region, gfns)


def bitmap_parts() -> tuple[BitmapTracker, BitmapLog]:
    buffer = np.zeros(bitmap_log_bytes(GEOMETRY), dtype=np.uint8)
    return BitmapTracker(GEOMETRY, buffer), BitmapLog(GEOMETRY, buffer)


def ring_parts(*, store_first: bool = True) -> tuple[RingTracker, RingLog]:
    buffer = np.zeros(ring_log_bytes(VCPUS, ENTRIES), dtype=np.uint8)
    return RingTracker(GEOMETRY, VCPUS, ENTRIES, buffer, store_first=store_first), RingLog(VCPUS, ENTRIES, 64, buffer)


@contextmanager
def bitmap() -> Iterator[Bench]:
    yield LogBench(*bitmap_parts(), capacity=None)


@contextmanager
def ring() -> Iterator[Bench]:
    yield LogBench(*ring_parts(), capacity=ENTRIES)


@contextmanager
def ring_log_first() -> Iterator[Bench]:
    yield LogBench(*ring_parts(store_first=False), capacity=ENTRIES)


@pytest.mark.parametrize("make", [bitmap, ring, ring_log_first], ids=lambda make: make.__name__)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_keeps_the_contract(check: Check, make: MakeBench) -> None:
    check(make)


class Broken:
    """A bitmap tracker with one of the mistakes that the contract is there to find."""

    name, exact, needs_pause = "broken", True, True

    def __init__(self, mistake: str, inner: Tracker) -> None:
        self.mistake, self.inner = mistake, inner
        self.last = DirtySet.empty(len(GEOMETRY))

    def start(self) -> None:
        self.inner.start()

    def harvest(self) -> DirtySet:
        dirty = self.inner.harvest()
        match self.mistake:
            case "loses the last page":
                return DirtySet([gfns[:-1] if index == 1 else gfns for index, gfns in enumerate(dirty.gfns)])
            case "does not reset":
                self.last = self.last.merge(dirty)
                return self.last
            case "hides an overflow":
                return DirtySet(dirty.gfns)
            case "invents pages":
                return dirty.merge(DirtySet.from_gfns([[17], [], []]))
        return dirty

    def restore(self, dirty: DirtySet) -> None:
        if self.mistake != "forgets what is put back":
            self.inner.restore(dirty)

    def stop(self) -> None:
        self.inner.stop()


@pytest.mark.parametrize(
    "mistake",
    ["loses the last page", "does not reset", "hides an overflow", "invents pages", "forgets what is put back"],
)
def test_the_contract_rejects_a_tracker_that(mistake: str) -> None:
    @contextmanager
    def make() -> Iterator[Bench]:
        tracker, log = ring_parts()
        yield LogBench(Broken(mistake, tracker), log, capacity=ENTRIES)

    def fails(check: Check) -> bool:
        try:
            check(make)
        except (AssertionError, HypothesisException, ExceptionGroup):
            return True
        return False

    assert any(fails(check) for check in CHECKS)
