"""Soft-dirty: the contract where the kernel has it; its refusal, and what it makes of the entries, everywhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from ckptd.errors import TrackerError, TrackerUnavailable
from ckptd.memory.dirtyset import DirtySet, Gfns
from ckptd.memory.regions import Geometry
from ckptd.trackers import soft_dirty
from ckptd.trackers.base import Tracker
from ckptd.trackers.soft_dirty import SoftDirtyTracker, self_test, written

from .contract import CHECKS, Bench, Check
from .plain_process import PlainProcess, plain_process

GEOMETRY = Geometry.of(low=130, ram=1300, rom=1)
PAGES = [region.pages for region in GEOMETRY]
DIRTY, PRESENT, SWAPPED = 1 << 55, 1 << 63, 1 << 62


class SoftDirtyBench:
    capacity = None
    geometry = GEOMETRY
    vcpus = 2

    def __init__(self, target: PlainProcess) -> None:
        self.tracker: Tracker = SoftDirtyTracker(GEOMETRY, target.pid, target.addresses)
        self._target = target

    def write(self, vcpu: int, region: int, gfns: Gfns) -> None:
        self._target.write(vcpu, region, gfns.tolist())


@pytest.mark.parametrize("kind", ["memfd", "private"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_keeps_the_contract(check: Check, kind: str) -> None:
    if why := self_test():
        pytest.skip(why)

    @contextmanager
    def make() -> Iterator[Bench]:
        with plain_process(kind, PAGES, vcpus=2) as target:
            bench = SoftDirtyBench(target)
            yield bench
            bench.tracker.stop()

    check(make)


def test_is_not_exact_and_needs_a_pause() -> None:
    tracker = SoftDirtyTracker(GEOMETRY, os.getpid(), [4096, 8192, 12288])
    assert (tracker.name, tracker.exact, tracker.needs_pause) == ("soft-dirty", False, True)
    tracker.stop()
    with pytest.raises(TrackerError, match="not started"):
        tracker.harvest()


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("print(0, 0, 0, 0)", "a page was written, and it reports 0 pages"),
        ("print()", "reports 0 pages"),
        ("raise PermissionError('no clear_refs')", "could not be tried: PermissionError: no clear_refs"),
        ("import os; os._exit(3)", "could not be tried: it ended with 3"),
    ],
)
def test_a_kernel_that_reports_nothing_is_refused(program: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft_dirty, "_PROGRAM", program)
    monkeypatch.setattr(soft_dirty, "self_test", self_test.__wrapped__)
    with plain_process("private", PAGES) as target:
        fds = sorted(os.listdir("/proc/self/fd"))
        with pytest.raises(TrackerUnavailable, match=why) as caught:
            SoftDirtyTracker(GEOMETRY, target.pid, target.addresses).start()
        assert "CONFIG_MEM_SOFT_DIRTY" in str(caught.value) and "6.7" in str(caught.value)
        assert sorted(os.listdir("/proc/self/fd")) == fds


def test_one_that_reports_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for program in ("print(0, 1, 0, 0)", "print(1, 1, 1, 1)"):
        monkeypatch.setattr(soft_dirty, "_PROGRAM", program)
        assert self_test.__wrapped__() is None


def test_written_are_the_marked_and_the_vanished() -> None:
    entries = np.array([PRESENT | DIRTY, PRESENT, DIRTY, 0, 0, SWAPPED | 5, SWAPPED | DIRTY], dtype=np.uint64)
    populated = np.array([True, True, False, True, False, True, False])
    assert written(entries, populated).tolist() == [0, 2, 3, 6]
    assert populated.tolist() == [True, True, False, False, False, True, True]
    assert written(entries, populated).tolist() == [0, 2, 6]


@pytest.fixture
def kernel_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the self-test had passed: on a kernel without it all entries are clean, and the rest works."""
    monkeypatch.setattr(soft_dirty, "self_test", lambda: None)
    monkeypatch.setattr(soft_dirty, "_ENTRIES", 100)


@pytest.mark.usefixtures("kernel_without")
def test_restores_and_discards_and_ends() -> None:
    with plain_process("private", PAGES) as target:
        tracker = SoftDirtyTracker(GEOMETRY, target.pid, target.addresses)
        target.write(0, 1, [3, 1299])
        tracker.start()
        tracker.restore(DirtySet.from_gfns([[1], [], []]))
        assert 1 in tracker.harvest().gfns[0]
        target.tell(b"d", 1, 3, 1)
        target.tell(b"d", 1, 1299, 1)
        assert {3, 1299} <= set(tracker.harvest().gfns[1].tolist())  # zeros now: vanished pages count as written
        target.tell(b"u", 1, 7, 1)
        with pytest.raises(TrackerError, match="nothing mapped"):
            tracker.harvest()
        target.end()
        with pytest.raises(TrackerError, match="has ended"):
            tracker.harvest()
        tracker.stop()


@pytest.mark.usefixtures("kernel_without")
def test_a_harvest_that_failed_is_an_overflow_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    with plain_process("private", PAGES) as target:
        tracker = SoftDirtyTracker(GEOMETRY, target.pid, target.addresses)
        tracker.start()
        with monkeypatch.context() as patch:
            patch.setattr(tracker._memory, "check", lambda: (_ for _ in ()).throw(TrackerError("changed")))
            with pytest.raises(TrackerError, match="changed"):
                tracker.harvest()
        assert tracker.harvest().overflowed
        assert not tracker.harvest().overflowed
        tracker.stop()


@pytest.mark.usefixtures("kernel_without")
def test_a_process_that_is_gone() -> None:
    with plain_process("private", PAGES) as target:
        pid, addresses = target.pid, target.addresses
    with pytest.raises(TrackerUnavailable, match="gone"):
        SoftDirtyTracker(GEOMETRY, pid, addresses).start()
