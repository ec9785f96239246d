"""`ckptd bench harvest`: what a harvest of KVM's dirty log costs, beside the bare ioctls and the cheapest scan of them.

A guest writes the same pages of its first 64 MiB in each round; rounds are harvested by the
tracker and by the bare calls in turn, in one VM, and each harvest must name every written page. Medians, in us.
"""

from __future__ import annotations

import fcntl
import gc
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptd.bench.machine import conditions, median
from ckptd.errors import CkptdError, TrackerUnavailable
from ckptd.guests.kvm import abi
from ckptd.guests.kvm.gate import KvmGate, gate_bytes
from ckptd.guests.kvm.machine import TRACKERS, Machine
from ckptd.guests.kvm.programs import assemble_file
from ckptd.guests.kvm.spec import BOOT_BLOCK, CODE, WORK, KvmSpec
from ckptd.guests.kvm.vcpu import KICK
from ckptd.guests.process.shared import make_file, map_file
from ckptd.memory.dirtyset import gfns_of_bitmap
from ckptd.memory.regions import Geometry
from ckptd.trackers.kvm_ring import KvmRingTracker
from ckptd.units import PAGE_SIZE

__all__ = ["COUNTS", "SIZES", "bench_harvest"]

SIZES = tuple(mib << 20 for mib in (64, 1 << 10, 16 << 10, 64 << 10))
COUNTS = (100, 1_000, 10_000)
LIMIT = 1.3
_RING = 65536
_FIRST = 64  # pages at the bottom hold program and list
_WITHIN = 64 << 20  # the same pages at every size of memory, so that its size is all that changes

_Scan = Callable[[npt.NDArray[np.uint64], int], npt.NDArray[np.int64]]


def bench_harvest(
    *, sizes: tuple[int, ...] = SIZES, counts: tuple[int, ...] = COUNTS, rounds: int = 15,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """One row for each tracker, size and count. Raises TrackerUnavailable where there is no KVM."""
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for size in sizes:
        for tracker in TRACKERS:
            if tracker in left_out:
                continue
            say(f"{tracker} at {size >> 20} MiB")
            try:
                rows += _measure(size, tracker, counts, rounds)
            except TrackerUnavailable as error:
                if tracker == "kvm-bitmap":
                    raise
                left_out[tracker] = str(error)
    of_ring = [one for one in rows if one["tracker"] == "kvm-ring"]
    ring = {(one["memory_bytes"], one["dirty_pages"]): one["harvest_us"] for one in of_ring}
    growth = {str(n): round(ring[sizes[-1], n] / ring[sizes[0], n], 2) for n in counts if (sizes[0], n) in ring}
    return {
        "bench": "harvest", "rows": rows, "limit_ratio": LIMIT, "met": all(row["ratio"] <= LIMIT for row in rows),
        "ring_growth": growth, "left_out": left_out, "rounds": rounds, "conditions": conditions(),
    }  # fmt: skip


def _measure(size: int, name: str, counts: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    signal.signal(KICK, lambda *_: None)
    spec = KvmSpec(Geometry.of(ram=size // PAGE_SIZE))
    memory = map_file(make_file("ckptd-bench", size))
    machine = Machine(spec, [memory], KvmGate(np.zeros(gate_bytes(1), dtype=np.uint8)))
    try:
        machine.begin([(CODE, assemble_file(Path(__file__).with_name("dirtier.S")))])
        tracker = machine.use_tracker(name, _RING)
        tracker.start()
        tracker.harvest()
        bare = _bare_ring(machine, tracker) if isinstance(tracker, KvmRingTracker) else _bare_bitmap(machine, name)
        rows = []
        for count in counts:
            gfns = np.linspace(_FIRST, min(size, _WITHIN) // PAGE_SIZE - 1, count).astype(np.int64)
            memory[WORK : WORK + 4 * count].view(np.uint32)[:] = gfns * PAGE_SIZE
            memory[BOOT_BLOCK : BOOT_BLOCK + 12].view(np.uint32)[:] = (WORK, count, 1)
            ours, theirs = _alternate(machine, lambda: tracker.harvest().gfns[0], bare, gfns, rounds)
            harvest_us, bare_us = (median(one) * 1e6 for one in (ours, theirs))
            rows.append({
                "tracker": name, "memory_bytes": size, "dirty_pages": count, "harvest_us": round(harvest_us, 1),
                "bare_us": round(bare_us, 1), "ratio": round(harvest_us / bare_us, 2),
            })  # fmt: skip
        return rows
    finally:
        machine.end()


def _alternate(
    machine: Machine, harvest: Callable[[], Any], bare: Callable[[], Any], written: npt.NDArray[np.int64], rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of each; two rounds to warm up do not count."""
    took: tuple[list[float], list[float]] = ([], [])
    gc.disable()
    try:
        for turn in range(2 * (rounds + 2)):
            machine.resume()
            machine.pause_at_marks(60)
            way = (harvest, bare)[turn % 2]
            began = time.perf_counter()
            found = way()
            seconds = time.perf_counter() - began
            if len(np.setdiff1d(written, found)):
                raise CkptdError("a harvest lacks pages that the guest has written", pages=len(written))
            if turn >= 4:
                took[turn % 2].append(seconds)
    finally:
        gc.enable()
    return took


def _bare_bitmap(machine: Machine, name: str) -> Callable[[], npt.NDArray[np.int64]]:
    """GET_DIRTY_LOG, a scan, and with manual clear one CLEAR_DIRTY_LOG of everything."""
    fd, pages = machine._vm.fd, machine.spec.geometry[0].pages
    words = np.zeros(-(-pages // 64), dtype=np.uint64)
    get = abi.DIRTY_LOG.pack(0, 0, words.ctypes.data)
    clear = bytearray(abi.CLEAR_LOG.pack(0, pages, 0, words.ctypes.data))
    scan: _Scan = gfns_of_bitmap  # the cheapest that we know: see memory/dirtyset.py

    def bare() -> npt.NDArray[np.int64]:
        fcntl.ioctl(fd, abi.GET_DIRTY_LOG, get)
        found = scan(words, pages)
        if name == "kvm-manual":
            fcntl.ioctl(fd, abi.CLEAR_DIRTY_LOG, clear)
        return found

    return bare


def _bare_ring(machine: Machine, tracker: KvmRingTracker) -> Callable[[], npt.NDArray[np.int64]]:
    """Entries read in their order and marked, then RESET_DIRTY_RINGS: neither sorted, nor checked."""
    fd, ring = machine._vm.fd, tracker._rings[0]

    def bare() -> npt.NDArray[np.int64]:
        start = ring.next & ring.last
        clean = ring.flags[start : start + ring.look] != 1  # as many as the last harvest had, and some
        count = int(clean.argmax())
        if not clean[count]:
            count = int((np.concatenate((ring.flags[start:], ring.flags[:start])) != 1).argmax())
        end = start + count
        found = ring.offsets[start:end].copy()
        ring.flags[start:end] = 2
        if end > ring.size:
            found = np.concatenate((found, ring.offsets[: end - ring.size]))
            ring.flags[: end - ring.size] = 2
        ring.next += count
        fcntl.ioctl(fd, abi.RESET_DIRTY_RINGS, 0)
        return found

    return bare
