"""The guards of the ring, one by one, over a log that overruns when it is told to; no KVM is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest

from ckptd.errors import TrackerError, TrackerUnavailable
from ckptd.memory.dirtyset import DirtySet
from ckptd.memory.regions import Geometry
from ckptd.trackers.kvm_log import Words
from ckptd.trackers.kvm_ring import ENTRY, KvmRingTracker, _dirty_from

GEOMETRY = Geometry.of(low=64, ram=5000)
SIZE, RESERVE = 1024, 200


class Rings:
    """KVM's side of the rings: logs, resets, overruns, and can be rebuilt."""

    def __init__(self, vcpus: int = 2) -> None:
        self.vcpus = vcpus
        self.rebuilt = 0
        self.full = False
        self.logging = False
        self.before_reset: Callable[[], None] = lambda: None
        self._new()

    def _new(self) -> None:
        self._rings = [np.zeros(SIZE, dtype=ENTRY) for _ in range(self.vcpus)]
        self.written, self.reset = [0] * self.vcpus, [0] * self.vcpus

    def log(self, vcpu: int, slot: int, gfns: Sequence[int]) -> None:
        """As virt/kvm/dirty_ring.c pushes: whatever is there is overwritten."""
        for gfn in gfns:
            self._rings[vcpu][self.written[vcpu] % SIZE] = (1, slot, gfn)
            self.written[vcpu] += 1

    def arm(self, logging: bool) -> None:
        self.logging = logging

    @property
    def rings(self) -> Sequence[npt.NDArray[np.void]]:
        return self._rings

    def waiting_on_full(self) -> bool:
        return self.full

    def reset_rings(self) -> int:
        self.before_reset()
        count = 0
        for vcpu, ring in enumerate(self._rings):
            while ring["flags"][self.reset[vcpu] % SIZE] & 2:
                ring["flags"][self.reset[vcpu] % SIZE] = 0
                self.reset[vcpu] += 1
                count += 1
        self.full = False
        return count

    def rebuild(self) -> None:
        self.rebuilt += 1
        self.full = False
        self._new()

    def get_dirty_log(self, region: int, words: Words) -> None:
        raise TrackerError("the ring has no bitmap")

    def clear_dirty_log(self, region: int, first: int, pages: int, words: Words) -> None:
        raise TrackerError("the ring has no bitmap")


@pytest.fixture
def rings() -> Rings:
    return Rings()


@pytest.fixture
def tracker(rings: Rings) -> KvmRingTracker:
    tracker = KvmRingTracker(GEOMETRY, rings, exact=True, entries=SIZE, reserve=RESERVE)
    tracker.start()
    rings.rebuilt = 0
    return tracker


def test_entries_of_all_vcpus_and_slots_become_one_set(rings: Rings, tracker: KvmRingTracker) -> None:
    rings.log(0, 1, [70, 3, 70])
    rings.log(1, 0, [63, 0])
    rings.log(1, 1, [4999, 3])
    assert tracker.harvest() == DirtySet.from_gfns([[0, 63], [3, 70, 4999]])
    assert not tracker.harvest()
    assert rings.rebuilt == 0


def test_it_goes_round_many_times(rings: Rings, tracker: KvmRingTracker) -> None:
    for turn in range(20):
        gfns = list(range(turn, turn + 700, 2)) + list(range(4000, 4037 + turn))
        rings.log(turn % 2, 1, gfns)
        assert tracker.harvest().gfns[1].tolist() == sorted(gfns)
    assert rings.written[0] > 3 * SIZE and rings.rebuilt == 0


def loses(tracker: KvmRingTracker, rings: Rings) -> None:
    """This harvest says that pages may be lost, the rings are new, and all is well afterwards."""
    assert tracker.harvest().overflowed
    assert rings.rebuilt == 1 and tracker.overflows == 1 and rings.logging
    rings.before_reset = lambda: None
    rings.log(0, 1, [5])
    assert tracker.harvest() == DirtySet.from_gfns([[], [5]])


@pytest.mark.parametrize("extra", [0, 1])
def test_more_than_size_minus_reserve_counts_as_overrun(extra: int, rings: Rings, tracker: KvmRingTracker) -> None:
    rings.log(1, 1, range(SIZE - RESERVE + extra))
    if extra:
        loses(tracker, rings)
    else:
        assert not tracker.harvest().overflowed


def test_a_ring_that_was_overrun_is_never_trusted(rings: Rings, tracker: KvmRingTracker) -> None:
    rings.log(0, 1, range(SIZE + 300))  # the first 300 are gone, and nothing in the ring shows it
    loses(tracker, rings)


def test_a_vcpu_that_comes_round_while_the_ring_is_read_counts_as_overrun(
    rings: Rings, tracker: KvmRingTracker
) -> None:
    rings.log(0, 1, range(100))
    rings.before_reset = lambda: rings.log(0, 1, range(1000, 1000 + SIZE - RESERVE - 100 + 1))
    loses(tracker, rings)


def test_what_is_logged_while_the_ring_is_read_is_in_the_next_harvest(rings: Rings, tracker: KvmRingTracker) -> None:
    rings.log(0, 1, range(100))
    rings.before_reset = lambda: rings.log(0, 1, [7, 2000])
    assert tracker.harvest().gfns[1].tolist() == list(range(100))
    rings.before_reset = lambda: None
    assert tracker.harvest().gfns[1].tolist() == [7, 2000]


def test_a_reset_of_another_number_counts_as_overrun(rings: Rings, tracker: KvmRingTracker) -> None:
    rings.log(0, 1, range(50))
    rings.before_reset = lambda: rings._rings[0]["flags"].__setitem__(20, 1)
    loses(tracker, rings)


@pytest.mark.parametrize(("slot", "gfn"), [(1, 5000), (0, 64), (2, 0), (1 << 16 | 1, 3), (1, (1 << 64) - 1)])
def test_an_entry_that_names_no_page_counts_as_overrun(
    slot: int, gfn: int, rings: Rings, tracker: KvmRingTracker
) -> None:
    rings.log(0, slot, [gfn])
    loses(tracker, rings)


def test_a_vcpu_that_waits_on_a_full_ring_in_which_nothing_is_counts_as_overrun(
    rings: Rings, tracker: KvmRingTracker
) -> None:
    rings.full = True
    loses(tracker, rings)


def test_the_first_clean_entry_may_become_dirty_while_it_is_looked_at() -> None:
    """As it happened: the entry that ended a harvest was looked at twice, and dirty the second time."""
    flags = np.zeros(SIZE, dtype=np.uint32)
    flags[:300] = 1

    class Racing(np.ndarray):  # type: ignore[type-arg]
        def __ne__(self, other: object) -> object:  # type: ignore[override]
            found = np.asarray(self) != other
            if len(self) > 300:  # the piece that ends the harvest
                flags[300] = 1  # the vCPU goes on, right behind the comparison
            return found

    assert _dirty_from(flags.view(Racing), 0) == 300


def test_half_full_says_so_before_it_is_full(rings: Rings, tracker: KvmRingTracker) -> None:
    rings.log(1, 1, range(SIZE // 2))
    assert not tracker.half_full
    rings.log(1, 1, [9])
    assert tracker.half_full
    tracker.harvest()
    assert not tracker.half_full


def test_when_nobody_harvests_any_more_the_rings_are_drained(rings: Rings, tracker: KvmRingTracker) -> None:
    rings.log(0, 1, range(500))
    tracker.stop()
    assert not rings.logging and rings.reset[0] == 500
    with pytest.raises(TrackerError, match="not started"):
        tracker.harvest()


def test_a_ring_smaller_than_what_a_vcpu_may_overrun_is_refused_with_the_cure() -> None:
    with pytest.raises(TrackerUnavailable, match="too small") as raised:
        KvmRingTracker(GEOMETRY, Rings(), exact=True, entries=256, reserve=200)
    assert "guest.ring_entries = 512" in (raised.value.hint or "")
