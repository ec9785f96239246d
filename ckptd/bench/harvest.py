"""`ckptd bench harvest`: what a harvest of KVM's dirty log costs, beside the bare ioctls and the cheapest scan of them.

A guest writes so many pages, picked by chance and in no order, and stops at a mark; then either the tracker or one of
the bare ways (bare.py) takes what is dirty, timed. They take turns, in the same VM and with the same pages, and every
result must hold all pages that the guest has written. While warming up all bare ways are tried; the best two remain,
and `bare_us` is the lesser of their medians. For a ring `unsorted_us` is a reading that leaves its list as it is.
Memory is sparse: only pages that were written exist. The guest runs in 32 bits, so the pages are below 3 GiB.

Where memory is larger, the pages lie further apart, which the kernel's own part of a harvest feels in its caches. So
`ring_growth` compares the largest and the smallest memory with the *same* pages, in turns: there nothing but the size
differs.
"""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import cycle
from pathlib import Path
from resource import RUSAGE_THREAD, getrusage
from typing import Any

import numpy as np

from ckptd.bench.bare import Way, bare_ways, unsorted_way
from ckptd.bench.machine import conditions, median
from ckptd.errors import ConfigError, GuestError, TrackerError, TrackerUnavailable
from ckptd.guests.kvm.gate import KvmGate, gate_bytes
from ckptd.guests.kvm.host import open_kvm
from ckptd.guests.kvm.machine import TRACKERS, Machine
from ckptd.guests.kvm.programs import assemble_file
from ckptd.guests.kvm.spec import BOOT_BLOCK, CODE, WORK, KvmSpec
from ckptd.guests.kvm.vcpu import KICK
from ckptd.guests.process.shared import make_file, map_file
from ckptd.memory.dirtyset import DirtySet, Gfns
from ckptd.memory.regions import Geometry
from ckptd.units import PAGE_SIZE, format_size

__all__ = ["COUNTS", "ROUNDS", "SIZES", "bench_harvest", "check_host"]

SIZES = tuple(mib << 20 for mib in (64, 1 << 10, 16 << 10, 64 << 10))
COUNTS = (100, 1_000, 10_000)
ROUNDS = 15
LIMIT = 1.3
_RING_ENTRIES = 65536
_MOST = 32768  # pages: far from what makes a ring lose some
_REACH = 3 << 30  # a guest of 32 bits, below what a PC keeps for devices
_SETS = 3  # sets of pages that are written in turns; odd, so that harvests and bare ways have each of them as often
_UNSORTED = "unsorted"
_TRIES = 3  # of a round that another process disturbs
_GUEST_LIMIT = 60.0  # seconds

Say = Callable[[str], None]
Take = Callable[[], DirtySet | Gfns]


def bench_harvest(
    *, sizes: Sequence[int] = SIZES, counts: Sequence[int] = COUNTS, rounds: int = ROUNDS, say: Say = print
) -> dict[str, Any]:
    """A row for each tracker, size and count. Raises TrackerUnavailable, GuestError, ConfigError."""
    _check(sizes, counts, rounds)
    check_host()
    sizes, counts = sorted(sizes), sorted(counts)
    rows: list[dict[str, Any]] = []
    starts: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    host: dict[str, object] = {}
    growth: list[dict[str, Any]] = []
    before = signal.signal(KICK, lambda *_: None)
    gc.disable()
    try:
        for size in sizes:
            for name in TRACKERS:
                if name in left_out:
                    continue
                say(f"{name}, {format_size(size)}")
                try:
                    with _guest(name, size, counts) as guest:
                        starts.append(guest.started)
                        host = guest.host
                        rows += [guest.measure(count, rounds) for count in counts]
                except TrackerUnavailable as error:
                    if name == "kvm-bitmap":
                        raise
                    left_out[name] = str(error)
        if "kvm-ring" not in left_out and len(sizes) > 1:
            say(f"kvm-ring, {format_size(sizes[0])} and {format_size(sizes[-1])} in turns")
            growth = _growth(sizes[0], sizes[-1], counts, rounds)
    finally:
        gc.enable()
        signal.signal(KICK, before)
    keys = ("tracker", "memory_bytes", "dirty_pages", "ratio")
    misses = [{key: row[key] for key in keys} for row in rows if row["ratio"] > LIMIT]
    return {
        "bench": "harvest", "rows": rows, "limit_ratio": LIMIT, "met": not misses, "misses": misses,
        "ring_growth": growth, "starts": starts, "left_out": left_out, "rounds": rounds,
        "conditions": {
            **conditions(), "numpy": np.__version__, **host, "vcpus": 1, "ring_entries": _RING_ENTRIES,
            "realtime": os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR),
        },
    }  # fmt: skip


def check_host() -> None:
    """Raises TrackerUnavailable without KVM, GuestError without an assembler, both with the cure."""
    os.close(open_kvm())
    _program()


@cache
def _program() -> bytes:
    return assemble_file(Path(__file__).with_name("dirtier.S"))


def _check(sizes: Sequence[int], counts: Sequence[int], rounds: int) -> None:
    if not sizes or not counts or rounds < 1:
        raise ConfigError("bench harvest needs a size of memory, a number of dirty pages and a round")
    if min(counts) < 1 or max(counts) > _MOST:
        raise ConfigError(f"bench harvest measures 1 to {_MOST} dirty pages")
    room = min(*sizes, _REACH) // PAGE_SIZE - _first_page(max(counts))
    if any(size % PAGE_SIZE for size in sizes) or room < max(counts):
        raise ConfigError(f"memory is whole pages; of {format_size(min(sizes))} a guest can dirty {max(room, 0)}")


def _first_page(most: int) -> int:
    """The first page behind the list of so many."""
    return (WORK + 4 * most + PAGE_SIZE - 1) // PAGE_SIZE


@contextmanager
def _guest(tracker: str, size_bytes: int, counts: Sequence[int]) -> Iterator[_Guest]:
    gc.collect()  # the memory of the last one: a machine and its threads know each other
    guest = _Guest(tracker, size_bytes, max(counts))
    try:
        yield guest
    finally:
        guest.machine.end()


class _Guest:
    """A machine whose guest writes the pages that it is told to, and its tracker, which has begun."""

    def __init__(self, tracker: str, size_bytes: int, most: int) -> None:
        spec = KvmSpec(Geometry.of(ram=size_bytes // PAGE_SIZE))
        memory = map_file(make_file("ckptd-bench", size_bytes))
        self._size = size_bytes
        self._first = _first_page(most)
        self._orders = memory[BOOT_BLOCK : BOOT_BLOCK + 12].view(np.uint32)
        self._list = memory[WORK : WORK + 4 * most].view(np.uint32)
        self._words = memory.view(np.uint32)[:: PAGE_SIZE // 4]
        self._round = 0
        self.machine = Machine(spec, [memory], KvmGate(np.zeros(gate_bytes(1), dtype=np.uint8)))
        try:
            self.machine.begin([(CODE, _program())])
            self.tracker = self.machine.use_tracker(tracker, _RING_ENTRIES)
            began = time.perf_counter()
            self.tracker.start()
            started = time.perf_counter()
            found = self.tracker.harvest()
            harvested = time.perf_counter()
        except BaseException:
            self.machine.end()
            raise
        self.started = {
            "tracker": tracker, "memory_bytes": size_bytes, "start_ms": round((started - began) * 1e3, 3),
            "first_harvest_ms": round((harvested - started) * 1e3, 3), "first_harvest_pages": found.pages,
        }  # fmt: skip

    @property
    def host(self) -> dict[str, object]:
        """What matters of this host's KVM."""
        features = self.machine.features
        return {
            "kvm": features.module, "hardware_paging": features.exact, "ring_reserve": features.ring_reserve,
        }  # fmt: skip

    def picked(self, count: int, size_bytes: int, seed: int) -> Gfns:
        """So many pages of the first `size_bytes`, in no order."""
        pages = np.arange(self._first, min(size_bytes, _REACH) // PAGE_SIZE, dtype=np.int64)
        return np.random.default_rng(seed).choice(pages, count, replace=False)

    def write(self, gfns: Gfns) -> None:
        """The guest runs until it has written all of these pages, and is paused."""
        self._round += 1
        self._list[: len(gfns)] = gfns * PAGE_SIZE
        self._orders[:] = (WORK, len(gfns), self._round)
        self.machine.resume()
        self.machine.pause_at_marks(_GUEST_LIMIT)
        if self.machine.stopped or not (self._words[gfns] == self._round).all():
            raise GuestError(f"the guest did not write its pages {self.machine.stopped}".rstrip())

    def time(self, gfns: Gfns, take: Take) -> tuple[float, int]:
        """Let the guest write, then take: microseconds, and how many pages were found beyond those written.

        Done again if something else ran on our CPU meanwhile, a few times at most.
        """
        for _ in range(_TRIES):
            self.write(gfns)
            before = getrusage(RUSAGE_THREAD).ru_nivcsw
            began = time.perf_counter()
            found = take()
            took = (time.perf_counter() - began) * 1e6
            undisturbed = getrusage(RUSAGE_THREAD).ru_nivcsw == before
            beyond = _beyond(gfns, found)
            if undisturbed:
                break
        return took, beyond

    def measure(self, count: int, rounds: int) -> dict[str, Any]:
        """A row."""
        sets = cycle([self.picked(count, self._size, seed) for seed in range(_SETS)])
        ways = bare_ways(self.machine, self.tracker)
        times = _times(count)
        _, tried, _ = self._in_turns(sets, ways, _SETS * times)
        best = sorted(ways, key=lambda name: median(tried[name]))[:2]
        chosen = {name: ways[name] for name in best}
        if unsorted := unsorted_way(self.machine, self.tracker):
            chosen[_UNSORTED] = unsorted
        harvest, bare, beyond = self._in_turns(sets, chosen, rounds * times)
        cheapest = min(best, key=lambda name: median(bare[name]))
        harvest_us, bare_us = median(harvest), median(bare[cheapest])
        return {
            "tracker": self.tracker.name, "memory_bytes": self._size, "dirty_pages": count,
            "harvest_us": round(harvest_us, 1), "bare_us": round(bare_us, 1), "ratio": round(harvest_us / bare_us, 3),
            "harvest_us_quartiles": _quartiles(harvest), "bare_us_quartiles": _quartiles(bare[cheapest]),
            "bare_way": cheapest, "rounds": rounds * times, "pages_beyond": beyond,
            **({"unsorted_us": round(median(bare[_UNSORTED]), 1)} if unsorted else {}),
        }  # fmt: skip

    def _in_turns(
        self, sets: Iterator[Gfns], ways: dict[str, Way], rounds: int
    ) -> tuple[list[float], dict[str, list[float]], int]:
        """What harvests and what bare ways took, and how many pages a harvest found beyond those written.

        Every second turn is the tracker's, and each turn has another set than the one before: nobody finds more in the
        CPU's caches than the others do.
        """
        harvest: list[float] = []
        bare: dict[str, list[float]] = {name: [] for name in ways}
        most = 0
        for _ in range(rounds):
            for name, way in ways.items():
                us, beyond = self.time(next(sets), self.tracker.harvest)
                harvest.append(us)
                most = max(most, beyond)
                bare[name].append(self.time(next(sets), way)[0])
        return harvest, bare, most


def _beyond(written: Gfns, found: DirtySet | Gfns) -> int:
    """How many more pages were found. Raises TrackerError if one that was written is not among them."""
    if isinstance(found, DirtySet):
        if found.overflowed:
            raise TrackerError("the log says that it has lost pages; the bench never fills it")
        found = found.gfns[0]
    missing = np.setdiff1d(written, found, assume_unique=True)
    if len(missing):
        raise TrackerError(f"{len(missing)} of {len(written)} written pages are missing", gfn=int(missing[0]))
    return len(found) - len(written)


def _times(count: int) -> int:
    """Rounds for one: with few pages a round is short, and chance weighs more."""
    return max(1, min(5, 2_000 // count))


def _growth(small: int, large: int, counts: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """The ring's harvest in the largest and the smallest memory, in turns, of the same pages in both."""
    found = []
    with _guest("kvm-ring", small, counts) as one, _guest("kvm-ring", large, counts) as other:
        for count in counts:
            sets = [one.picked(count, small, seed) for seed in range(_SETS)]
            took: tuple[list[float], list[float]] = ([], [])
            for turn in range(-_SETS, rounds * _times(count)):
                for guest, times in zip((one, other), took, strict=True):
                    us, _ = guest.time(sets[turn % _SETS], guest.tracker.harvest)
                    if turn >= 0:
                        times.append(us)
            ours, theirs = median(took[0]), median(took[1])
            found.append({
                "dirty_pages": count, "memory_bytes": [small, large], "harvest_us": [round(ours, 1), round(theirs, 1)],
                "ratio": round(theirs / ours, 3),
            })  # fmt: skip
    return found


def _quartiles(values: list[float], digits: int = 1) -> list[float]:
    return [round(float(one), digits) for one in np.percentile(values, (25, 75))]
