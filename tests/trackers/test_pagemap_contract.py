"""The tracker of any process keeps the contract of all trackers, and never loses a page when mappings change."""

from __future__ import annotations

import itertools
import mmap
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ckptd.errors import ConfigError, TrackerError, TrackerUnavailable
from ckptd.memory.dirtyset import DirtySet, Gfns
from ckptd.memory.regions import Geometry
from ckptd.trackers import mappings, pagemap, soft_dirty, userfaultfd
from ckptd.trackers.base import Tracker
from ckptd.trackers.pagemap import PagemapTracker
from ckptd.trackers.process import process_tracker
from ckptd.trackers.soft_dirty import SoftDirtyTracker
from ckptd.trackers.userfaultfd import KernelLacks

from .contract import CHECKS, Bench, Check
from .plain_process import KINDS, PAGE, PlainProcess, plain_process

GEOMETRY = Geometry.of(low=130, ram=1300, rom=1)
PAGES = [region.pages for region in GEOMETRY]


def unavailable() -> str | None:
    """Why not here."""
    if lacks := userfaultfd.kernel_lacks():
        return str(lacks)
    try:
        with plain_process("private", [1]) as target:
            tracker = PagemapTracker(Geometry.of(ram=1), target.pid, target.addresses)
            tracker.start()
            tracker.stop()
    except TrackerUnavailable as error:
        return str(error)
    return None


@pytest.fixture(autouse=True, scope="module")
def _possible_here() -> None:
    if why := unavailable():
        pytest.skip(why)


class ProcessBench:
    capacity = None
    geometry = GEOMETRY
    vcpus = 3

    def __init__(self, target: PlainProcess) -> None:
        self.tracker: Tracker = PagemapTracker(GEOMETRY, target.pid, target.addresses)
        self._target = target

    def write(self, vcpu: int, region: int, gfns: Gfns) -> None:
        self._target.write(vcpu, region, gfns.tolist())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_keeps_the_contract(check: Check, kind: str) -> None:
    @contextmanager
    def make() -> Iterator[Bench]:
        with plain_process(kind, PAGES, vcpus=3) as target:
            bench = ProcessBench(target)
            try:
                yield bench
            finally:
                bench.tracker.stop()

    check(make)


@contextmanager
def tracked(kind: str, start: bool = True) -> Iterator[tuple[PlainProcess, PagemapTracker]]:
    with plain_process(kind, PAGES) as target:
        tracker = PagemapTracker(GEOMETRY, target.pid, target.addresses)
        if start:
            tracker.start()
        yield target, tracker
        tracker.stop()


def wait_for_sleep(target: PlainProcess) -> None:
    """Until it has become sleep(1)."""
    while b"sleep" not in Path(f"/proc/{target.pid}/cmdline").read_bytes():
        time.sleep(0.001)


def ram(*gfns: int) -> DirtySet:
    return DirtySet.from_gfns([[], list(gfns), []])


@pytest.mark.parametrize("kind", KINDS)
def test_is_exact_and_needs_no_pause(kind: str) -> None:
    with tracked(kind) as (_, tracker):
        assert tracker.exact and not tracker.needs_pause and tracker.name == "pagemap"


@pytest.mark.parametrize("kind", ["memfd", "private"])
def test_nothing_is_lost_while_the_guest_writes(kind: str) -> None:
    """Copies of the dirty pages, read while it goes on writing, add up to its memory."""
    with tracked(kind) as (target, tracker), open(f"/proc/{target.pid}/mem", "rb", buffering=0) as memory:
        target.begin(b"l", region=1)
        image = {gfn: bytes(PAGE) for gfn in range(PAGES[1])}
        for last in itertools.chain([False] * 100, [True]):
            if last:
                target.tell(b".")
            for gfn in tracker.harvest().gfns[1].tolist():
                image[gfn] = os.pread(memory.fileno(), PAGE, target.addresses[1] + gfn * PAGE)
        now = os.pread(memory.fileno(), PAGE * PAGES[1], target.addresses[1])
        assert [gfn for gfn, page in image.items() if page != now[gfn * PAGE : (gfn + 1) * PAGE]] == []
        assert any(now)


def test_a_full_vector_is_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagemap, "_RUNS", 7)
    with tracked("private") as (target, tracker):
        gfns = range(0, PAGES[1], 2)
        target.write(0, 1, gfns)
        assert tracker.harvest() == ram(*gfns)
        assert not tracker.harvest()


def test_a_walk_that_tells_an_earlier_end_is_put_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel does now and then, in a long walk beside a guest that writes."""
    with tracked("private") as (target, tracker):
        target.write(0, 1, [5, 600, 1299])
        real, calls = userfaultfd.walk_from, 0

        def walk(pagemap: int, argument: bytearray, start: int, end: int) -> tuple[int, int]:
            nonlocal calls
            count, ended = real(pagemap, argument, start, end)
            if start != target.addresses[1]:
                return count, ended
            calls += 1
            target.write(0, 1, [700, 1299])
            return count, start + 500 * PAGE

        monkeypatch.setattr(userfaultfd, "walk_from", walk)
        assert tracker.harvest() == ram(5, 600, 700, 1299)
        assert calls == 1


def test_start_again_drops_and_attaches_no_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with tracked("private") as (target, tracker):
        monkeypatch.setattr(pagemap, "take_userfaultfd", lambda pid: pytest.fail("attached again"))
        target.write(0, 1, [4])
        tracker.start()
        target.write(0, 1, [5])
        assert tracker.harvest() == ram(5)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_behind(kind: str) -> None:
    with tracked(kind, start=False) as (target, tracker):
        ours, theirs = sorted(os.listdir("/proc/self/fd")), target.descriptors()
        tracker.start()
        assert target.descriptors() == theirs
        assert "uw" in target.vm_flags()
        tracker.stop()
        assert target.descriptors() == theirs
        assert "uw" not in target.vm_flags()
        assert sorted(os.listdir("/proc/self/fd")) == ours
        with pytest.raises(TrackerError, match="not started"):
            tracker.harvest()


def test_a_failed_start_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    with tracked("private", start=False) as (target, tracker):
        ours, theirs = sorted(os.listdir("/proc/self/fd")), target.descriptors()
        with monkeypatch.context() as patch:
            patch.setitem(userfaultfd._FEATURES, "OF_TOMORROW", 1 << 60)
            with pytest.raises(KernelLacks, match=r"OF_TOMORROW.*Linux 6\.7"):
                tracker.start()
        assert (sorted(os.listdir("/proc/self/fd")), target.descriptors()) == (ours, theirs)
        tracker.start()
        target.write(0, 1, [1])
        assert tracker.harvest() == ram(1)


def test_a_kernel_without_the_scan_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userfaultfd, "SCAN", 0xC06066EE)
    monkeypatch.setattr(userfaultfd, "kernel_lacks", userfaultfd.kernel_lacks.__wrapped__)
    with tracked("private", start=False) as (target, tracker):
        with pytest.raises(KernelLacks, match=r"PAGEMAP_SCAN.*6\.7"):
            tracker.start()
        assert "uw" not in target.vm_flags()


# What becomes of it when the process changes.


def test_the_process_dies() -> None:
    with tracked("private") as (target, tracker):
        target.end()
        for _ in range(2):
            with pytest.raises(TrackerError, match=f"process {target.pid} has ended"):
                tracker.harvest()
        with pytest.raises(TrackerError, match="has ended"):
            tracker.start()
        with pytest.raises(TrackerUnavailable, match="gone"):
            tracker.start()


def test_the_process_becomes_another_program() -> None:
    with tracked("private") as (target, tracker):
        target.begin(b"x")
        wait_for_sleep(target)
        with pytest.raises(TrackerError, match="runs another program"):
            tracker.harvest()


@pytest.mark.parametrize("kind", ["memfd", "private", "huge"])
def test_unmapped_memory_is_an_error_and_then_an_overflow(kind: str) -> None:
    with tracked(kind) as (target, tracker):
        target.write(0, 1, [2])
        target.tell(b"u", 1, 7, 1)
        for _ in range(2):
            with pytest.raises(TrackerError, match=r"nothing mapped at .*\(region ram\)"):
                tracker.harvest()
        target.tell(b"a", 1, 0, PAGES[1])
        assert tracker.harvest().overflowed  # [2] was taken by the harvest that failed
        target.write(0, 1, [3, 7])
        assert tracker.harvest() == ram(3, 7)


@pytest.mark.parametrize("how", [b"u", b"m"])
def test_memory_that_went_away_as_a_whole(how: bytes) -> None:
    with tracked("private") as (target, tracker):
        target.tell(how, 1, 0, PAGES[1])
        with pytest.raises(TrackerError, match="nothing mapped"):
            tracker.harvest()


@pytest.mark.parametrize("kind", ["memfd", "private"])
@pytest.mark.parametrize("pages", [3, PAGES[1]])
def test_memory_mapped_anew_is_an_overflow_and_protected_again(kind: str, pages: int) -> None:
    with tracked(kind) as (target, tracker):
        target.write(0, 1, [1000])
        target.tell(b"a", 1, 0, pages)
        assert tracker.harvest().overflowed
        assert not tracker.harvest()
        target.write(0, 1, [1, 1001])
        assert tracker.harvest() == ram(1, 1001)


def test_an_overflow_that_could_not_be_armed_again_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with tracked("private") as (target, tracker):
        target.tell(b"a", 1, 0, 3)
        with monkeypatch.context() as patch:
            patch.setattr(userfaultfd, "register", lambda *_: (_ for _ in ()).throw(OSError(16, "Busy")))
            with pytest.raises(TrackerUnavailable, match="another userfaultfd"):
                tracker.harvest()
        assert tracker.harvest().overflowed
        assert not tracker.harvest()


def test_what_a_failed_harvest_took_is_an_overflow_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with tracked("private") as (target, tracker):
        target.write(0, 1, [2])
        with monkeypatch.context() as patch:
            patch.setattr(tracker._memory, "check", lambda: (_ for _ in ()).throw(TrackerError("changed")))
            with pytest.raises(TrackerError, match="changed"):
                tracker.harvest()
        assert tracker.harvest().overflowed
        assert not tracker.harvest()


def test_a_child_of_ours_that_holds_the_descriptor_keeps_nothing_protected() -> None:
    with tracked("private") as (target, tracker):
        held = os.dup(tracker._uffd)  # as a fork without exec has it
        tracker.stop()
        assert "uw" not in target.vm_flags()
        os.close(held)


def test_another_file_in_its_place_is_an_error() -> None:
    with tracked("memfd") as (target, tracker):
        target.tell(b"o", 1, 4, 2)
        with pytest.raises(TrackerError, match=r"other memory at its region.*inode"):
            tracker.harvest()


@pytest.mark.parametrize("kind", ["private", "huge", "split"])
@pytest.mark.parametrize(("first", "pages"), [(3, 1), (0, 1024), (512, 512)])
def test_discarded_anonymous_memory_is_dirty(kind: str, first: int, pages: int) -> None:
    with tracked(kind) as (target, tracker):
        target.write(0, 1, range(first, first + pages))
        tracker.harvest()
        target.tell(b"d", 1, first, pages)
        assert not ram(*range(first, first + pages)).subtract(tracker.harvest())


def test_holes_are_found_where_the_scan_hides_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on kernels that do not count a missing page table as written: here those pages are left to the second scan."""
    monkeypatch.setattr(userfaultfd, "hides_holes", lambda: True)
    with tracked("private") as (target, tracker):
        assert len(tracker._scans) == 2
        target.write(0, 1, [3, 600])
        assert tracker.harvest() == ram(3, 600)
        tracker._scans.reverse()  # what is found first is protected and not found again
        target.tell(b"d", 1, 0, PAGES[1])
        dropped = tracker._walk(tracker._scans[0], *tracker._memory.ranges[1])
        whole_tables = {gfn for gfn in range(PAGES[1]) if _whole_table(target.addresses[1], gfn, PAGES[1])}
        assert whole_tables <= set(dropped.tolist())
        found = tracker.harvest().merge(DirtySet([dropped[:0], dropped, dropped[:0]]))
        assert not ram(*range(PAGES[1])).subtract(found)
        target.write(0, 1, [700])
        assert tracker.harvest() == ram(700)


def _whole_table(address: int, gfn: int, pages: int) -> bool:
    table = (address // PAGE + gfn) // 512 * 512 - address // PAGE
    return table >= 0 and table + 512 <= pages


def test_where_it_cannot_be_tried_holes_are_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> int:
        raise PermissionError(1, "no")

    monkeypatch.setattr(userfaultfd, "open_user_mode", refused)
    assert userfaultfd.hides_holes.__wrapped__()
    assert userfaultfd.kernel_lacks.__wrapped__() is None  # not permitted: nothing is known


def test_without_the_query_the_text_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 6.11."""
    monkeypatch.setattr(mappings, "_QUERY", 0xC06866EE)
    with tracked("split") as (target, tracker):
        assert not tracker.exact  # the text does not say the size of pages
        target.write(0, 1, [3])
        assert tracker.harvest() == ram(3)
        target.tell(b"u", 1, 7, 1)
        with pytest.raises(TrackerError, match="nothing mapped"):
            tracker.harvest()
    for end in (PlainProcess.end, lambda target: target.begin(b"x")):
        with tracked("memfd") as (target, tracker):
            end(target)
            if target.process.poll() is None:
                wait_for_sleep(target)
            with pytest.raises(TrackerError, match="has ended"):
                tracker.harvest()


def test_addresses_must_be_possible() -> None:
    with pytest.raises(TrackerError, match="2 addresses for a guest of 1"):
        PagemapTracker(Geometry.of(ram=1), os.getpid(), [0, 0])
    for address in (0, 4097, 1 << 63):
        with pytest.raises(TrackerError, match="region ram cannot begin at"):
            PagemapTracker(Geometry.of(ram=1), os.getpid(), [address])
    with plain_process("private", [4]) as target:
        tracker = PagemapTracker(Geometry.of(ram=4), target.pid, [PAGE])
        with pytest.raises(TrackerError, match=r"nothing mapped at 0x1000.*\(region ram\)"):
            tracker.start()


# Which tracker.


def test_auto_is_pagemap_here() -> None:
    with plain_process("private", [4]) as target:
        tracker = process_tracker("auto", Geometry.of(ram=4), target.pid, target.addresses)
        assert isinstance(tracker, PagemapTracker)


def test_a_name_is_taken_at_its_word() -> None:
    assert isinstance(process_tracker("pagemap", Geometry.of(ram=1), 1, [PAGE]), PagemapTracker)
    assert isinstance(process_tracker("soft-dirty", Geometry.of(ram=1), 1, [PAGE]), SoftDirtyTracker)
    with pytest.raises(ConfigError, match="auto, pagemap, soft-dirty"):
        process_tracker("ring", Geometry.of(ram=1), 1, [PAGE])


def test_soft_dirty_only_where_the_kernel_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = KernelLacks("no WP_ASYNC", hint="use Linux 6.7")
    monkeypatch.setattr(userfaultfd, "kernel_lacks", lambda: lacks)
    monkeypatch.setattr(soft_dirty, "self_test", lambda: None)
    assert isinstance(process_tracker("auto", Geometry.of(ram=1), 1, [PAGE]), SoftDirtyTracker)
    monkeypatch.setattr(soft_dirty, "self_test", lambda: "reports nothing")
    with pytest.raises(TrackerUnavailable, match=r"pagemap: no WP_ASYNC; soft-dirty: reports nothing; use Linux 6\.7"):
        process_tracker("auto", Geometry.of(ram=1), 1, [PAGE])


def test_what_is_documented_as_not_seen() -> None:
    """Another mapping of the same memfd, and pwrite to it: whoever relies on it must read this here."""
    with tracked("memfd") as (target, tracker):
        links = [os.readlink(f"/proc/{target.pid}/fd/{fd}") for fd in target.descriptors()]
        fd = next(fd for fd, link in zip(target.descriptors(), links, strict=True) if "guest" in link)
        with open(f"/proc/{target.pid}/fd/{fd}", "r+b", buffering=0) as file:
            with mmap.mmap(file.fileno(), 0) as mapped:
                mapped[0:8] = struct.pack("<Q", 7)
            os.pwrite(file.fileno(), b"x", 3 * PAGE)
        assert not tracker.harvest()
