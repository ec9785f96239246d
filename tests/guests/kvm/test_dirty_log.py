"""The invariants of the kernel's own selftest, for the three trackers, over a real KVM.

Source: Linux tools/testing/selftests/kvm/dirty_log_test.c. A guest writes the number of the iteration to random pages
of a region that does not end at a multiple of 64 pages; each iteration is harvested once while it runs and once after
its vCPUs have stopped. Then, with I the iteration:

    1  the vCPUs have stopped before the last harvest and the comparison
    2  a page that either harvest reports holds I
    3  a page that neither reports holds less than I: the loss detector
    4  ring: a page reported last may be logged with its store to come, and hold less than I
    5  ring: such a page of the iteration before may hold I - 1
    6  manual clear: the first harvest reports everything, so there a page may hold 0
    7  a reset gives back as many entries as were harvested
    8  an entry names an existing page
    9  a vCPU that left on a full ring makes no progress until a reset, and does afterwards
    10 a bitmap is taken by reading it, so a page is in one harvest of the two; a ring adds up

Shadow paging logs the guest's page tables, and a page that was written again before it was protected: there a superset
is right (2 need not hold), on hardware paging equality.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from ckptd.guests.kvm.machine import TRACKERS, Machine
from ckptd.guests.kvm.spec import LOCK, KvmSpec
from ckptd.memory.dirtyset import DirtySet, Gfns
from ckptd.memory.regions import Geometry
from ckptd.trackers.kvm_log import KvmTracker
from ckptd.trackers.kvm_ring import KvmRingTracker
from ckptd.units import PAGE_SIZE

from .machines import Puppet, assembled, machine_over, needs_kvm, new_memory, ring_here

pytestmark = [pytest.mark.kvm, needs_kvm]

PAGES = (64 << 20) // PAGE_SIZE + 3
GEOMETRY = Geometry.of(low=32, test=PAGES)
ITERATIONS, LEAST_WRITES = 32, 0x100

# Writes the number at LOCK to pages that chance picks; a mark after every 64. edi counts the writes.
_RANDOM_WRITER = f"""
    lea 0x1234567(%eax), %esi
    xor %edi, %edi
again:
    mov $64, %ebp
one:
    imul $1664525, %esi, %esi
    add $1013904223, %esi
    mov ${PAGES}, %eax
    mul %esi
    shl $12, %edx
    mov {LOCK:#x}, %eax
    mov %eax, {{base}}(%edx)
    inc %edi
    dec %ebp
    jnz one
    mov $0x600, %edx
    mov $1, %eax
    outl %eax, %dx
    jmp again
"""


class Writer:
    """The guest of the selftest, its tracker, and what the test knows of it."""

    def __init__(self, machine: Machine, tracker: KvmTracker, memory: list[np.ndarray]) -> None:  # type: ignore[type-arg]
        self.machine, self.tracker = machine, tracker
        self._iteration = memory[0][LOCK : LOCK + 4].view(np.uint32)
        self.values = memory[1].reshape(-1, PAGE_SIZE)[:, :4].view(np.uint32).reshape(-1)

    @property
    def writes(self) -> int:
        return 64 * sum(vcpu.marks for vcpu in self.machine.vcpus)

    def iteration(self, number: int, seconds: float = 0.004, harvests: int = 1) -> list[Gfns] | None:
        """Run it; what each harvest reports of the test region, the last one from stopped vCPUs. None: overflowed."""
        self._iteration[0] = number
        before = self.writes
        found: list[DirtySet] = []
        self.machine.resume()
        for _ in range(harvests):
            self.run_for(before + LEAST_WRITES // 2, seconds)
            found.append(self.tracker.harvest())
        self.run_for(before + LEAST_WRITES, seconds)
        self.machine.pause()
        found.append(self.tracker.harvest())
        return None if any(one.overflowed for one in found) else [one.gfns[1] for one in found]

    def run_for(self, writes: int, seconds: float) -> None:
        """So long, and until there are so many writes (or a vCPU waits for a harvest)."""
        until = time.monotonic() + 20
        time.sleep(seconds)
        while self.writes < writes and not self.machine.waiting_on_full() and time.monotonic() < until:
            time.sleep(0.001)

    def check(self, number: int, found: list[Gfns], exact: bool, last: set[int], before: set[int]) -> int:
        """Invariants 2 to 5; how many pages were reported that were not written."""
        reported = np.zeros(PAGES, dtype=bool)
        for gfns in found:
            reported[gfns] = True
        lost = np.flatnonzero(~reported & (self.values >= number))
        assert not len(lost), f"pages {lost[:5].tolist()} were written in iteration {number} and never reported"
        stale = np.flatnonzero(reported & (self.values != number))
        assert (self.values <= number).all()
        if exact:
            wrong = [gfn for gfn in stale.tolist() if gfn not in last and not (gfn in before and
                     self.values[gfn] == number - 1)]  # fmt: skip
            assert not wrong, f"pages {wrong[:5]} were reported in iteration {number} and not written"
        return len(stale)


@contextmanager
def writer(tracker: str, place: Path, *, vcpus: int = 1, entries: int = 65536) -> Iterator[Writer]:
    if tracker == "kvm-ring" and (why := ring_here()):
        pytest.skip(why)
    spec = KvmSpec(GEOMETRY, vcpus=vcpus)
    memory = new_memory(spec)
    with machine_over(spec, assembled(_RANDOM_WRITER.format(base=hex(spec.places[1])), place), memory) as machine:
        used = machine.use_tracker(tracker, entries)
        used.start()
        yield Writer(machine, used, memory)


@pytest.mark.parametrize("vcpus", [1, 3])
@pytest.mark.parametrize("tracker", TRACKERS)
def test_no_write_is_lost_and_none_is_invented(tracker: str, vcpus: int, tmp_path: Path) -> None:
    with writer(tracker, tmp_path, vcpus=vcpus) as guest:
        last: set[int] = set()
        superfluous = reported = 0
        for number in range(1, ITERATIONS + 1):
            before = guest.writes
            found = guest.iteration(number)
            assert found is not None, "a ring that is never half full lost nothing, and said so"
            assert guest.writes >= before + LEAST_WRITES  # progress
            exact = guest.tracker.exact and not (tracker == "kvm-manual" and number == 1)
            newest = {int(gfns[-1]) for gfns in found if len(gfns)} if tracker == "kvm-ring" else set()
            stale = guest.check(number, found, exact, newest, last)
            if number > 1:
                superfluous, reported = superfluous + stale, reported + sum(map(len, found))
            last = newest
        assert superfluous <= reported // 20, "a superset, but a close one"
        if isinstance(guest.tracker, KvmRingTracker):
            assert guest.tracker.overflows == 0  # so every reset gave back what was harvested, and every entry existed


@pytest.mark.parametrize("tracker", TRACKERS)
def test_the_loss_detector_finds_a_tracker_that_drops_one_page(tracker: str, tmp_path: Path) -> None:
    with writer(tracker, tmp_path) as guest:
        guest.iteration(1)
        found = guest.iteration(2)
        assert found is not None
        dropped = [gfns[gfns != found[-1][0]] for gfns in found]
        guest.check(2, found, False, set(), set())
        with pytest.raises(AssertionError, match="never reported"):
            guest.check(2, dropped, False, set(), set())


@pytest.mark.parametrize("tracker", ["kvm-bitmap", "kvm-manual"])
def test_reading_a_bitmap_takes_it(tracker: str, tmp_path: Path) -> None:
    spec = KvmSpec(GEOMETRY)
    with Puppet.made(spec, tracker, tmp_path) as bench:
        bench.tracker.start()
        bench.harvest()
        bench.write(0, 1, np.arange(0, PAGES, 97))
        first, second = bench.harvest(), bench.harvest()
        assert set(range(0, PAGES, 97)) <= set(first.gfns[1].tolist())
        assert not second


def test_manual_clear_reports_everything_at_first_where_the_kernel_sets_all_bits(tmp_path: Path) -> None:
    with Puppet.made(KvmSpec(GEOMETRY), "kvm-manual", tmp_path) as bench:
        if not bench.machine.features.initially_set:
            pytest.skip("this kernel has no KVM_DIRTY_LOG_INITIALLY_SET")
        bench.tracker.start()
        assert bench.harvest() == DirtySet.everything(GEOMETRY)
        assert not bench.harvest()


def test_a_bit_that_is_set_between_read_and_clear_stays_set(tmp_path: Path) -> None:
    """Manual clear resets what was read, and not what came after it, even in the same word."""
    with Puppet.made(KvmSpec(GEOMETRY), "kvm-manual", tmp_path) as bench:
        bench.tracker.start()
        bench.harvest()
        bench.write(0, 1, np.array([64, 70]))
        get = bench.machine.get_dirty_log
        bench.machine.get_dirty_log = lambda region, words: (  # type: ignore[method-assign]
            get(region, words), bench.write(0, 1, np.array([65, 66])) if region == 1 else None
        )[0]  # fmt: skip
        assert {64, 70} <= set(bench.harvest().gfns[1].tolist())
        bench.machine.get_dirty_log = get  # type: ignore[method-assign]
        assert {65, 66} <= set(bench.harvest().gfns[1].tolist())


def test_a_vcpu_on_a_full_ring_waits_for_a_reset(tmp_path: Path) -> None:
    with writer("kvm-ring", tmp_path, entries=4096) as guest:
        guest.machine.resume()
        for _ in range(3):
            until = time.monotonic() + 20
            while not guest.machine.waiting_on_full():
                assert time.monotonic() < until, "the ring never fills"
                time.sleep(0.001)
            before = guest.writes
            time.sleep(0.05)
            assert guest.writes == before
            guest.tracker.harvest()
            guest.run_for(before + 64, 0)
            assert guest.writes > before


@pytest.mark.parametrize(("tracker", "entries"), [*((one, 65536) for one in TRACKERS), ("kvm-ring", 4096)])
def test_a_copy_by_harvests_is_never_wrong(tracker: str, entries: int, tmp_path: Path) -> None:
    """100 rounds: pages are copied after each harvest, half of them while the guest runs. With the small ring, a vCPU
    writes more than the ring holds in most rounds: what is lost must have been said to be lost."""
    with writer(tracker, tmp_path, vcpus=2, entries=entries) as guest:
        copy = guest.values.copy()
        overflows = 0

        def take() -> None:
            nonlocal overflows
            dirty = guest.tracker.harvest()
            if dirty.overflowed:
                overflows += 1
                guest.machine.pause()
                # what a daemon does then: resend everything
                copy[:] = guest.values
            else:
                copy[dirty.gfns[1]] = guest.values[dirty.gfns[1]]

        for number in range(1, 101):
            guest._iteration[0] = number
            guest.machine.resume()
            if entries == 4096 and number % 2:  # until a vCPU has filled its ring, and more
                guest.run_for(1 << 62, 0)
                assert guest.machine.waiting_on_full()
            else:
                time.sleep(0.003)
            take()
            if guest.machine.paused:
                guest.machine.resume()
            time.sleep(0.002)
            guest.machine.pause()
            take()
            wrong = np.flatnonzero(copy != guest.values)
            assert not len(wrong), f"round {number}: pages {wrong[:5].tolist()} of the copy are wrong"
        assert overflows >= 50 if entries == 4096 else not overflows
