"""A ring of one region takes a shorter way to its harvest: it keeps the guards, the order and the uniqueness."""

from __future__ import annotations

import numpy as np
import pytest

from ckptd.memory.dirtyset import DirtySet
from ckptd.memory.regions import Geometry
from ckptd.trackers.kvm_ring import KvmRingTracker, _sorted

from .test_kvm_ring import RESERVE, SIZE, Rings


@pytest.mark.parametrize("end", [1 << 16, 1 << 20, 1 << 32])
@pytest.mark.parametrize("count", [1, 2, 5_000])
def test_places_are_sorted_by_their_halves(count: int, end: int) -> None:
    places = np.random.default_rng(count).integers(0, end, count)
    places[:2] = end - 1
    assert _sorted(places, end).tolist() == sorted(places.tolist())


@pytest.fixture
def rings() -> Rings:
    return Rings()


@pytest.fixture(params=[5_000, 1 << 20])
def tracker(request: pytest.FixtureRequest, rings: Rings) -> KvmRingTracker:
    tracker = KvmRingTracker(Geometry.of(ram=request.param), rings, exact=True, entries=SIZE, reserve=RESERVE)
    tracker.start()
    return tracker


@pytest.mark.parametrize("count", [1, 100, 700])
def test_a_ring_of_one_region_is_sorted_and_holds_no_page_twice(
    count: int, rings: Rings, tracker: KvmRingTracker
) -> None:
    for turn in range(5):
        gfns = np.random.default_rng(turn).integers(0, 5_000, count).tolist()
        rings.log(0, 0, gfns)
        rings.log(1, 0, gfns[:50])
        assert tracker.harvest().gfns[0].tolist() == sorted(set(gfns))
    assert tracker.overflows == 0


@pytest.mark.parametrize(("slot", "gfn"), [(1, 3), (1 << 16, 3), (0, 1 << 20), (0, 1 << 32), (0, (1 << 64) - 1)])
@pytest.mark.parametrize("before", [0, 10, 600])
@pytest.mark.parametrize("after", [0, 10])
def test_an_entry_of_no_page_counts_as_overrun_in_one_region_too(
    after: int, before: int, slot: int, gfn: int, rings: Rings, tracker: KvmRingTracker
) -> None:
    rings.log(0, 0, range(before))
    rings.log(0, slot, [gfn])
    rings.log(0, 0, range(after))
    assert tracker.harvest().overflowed and tracker.overflows == 1
    rings.log(0, 0, [5])
    assert tracker.harvest() == DirtySet.from_gfns([[5]])


def test_a_ring_full_of_entries_of_no_page_is_lost_and_says_so() -> None:
    rings = Rings(vcpus=1)
    tracker = KvmRingTracker(Geometry.of(low=64, ram=5000), rings, exact=True, entries=SIZE, reserve=RESERVE)
    tracker.start()
    rings.log(0, 9, range(SIZE))
    assert tracker.harvest() == DirtySet.empty(2, overflowed=True)
