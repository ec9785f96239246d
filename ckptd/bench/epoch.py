"""`ckptd bench epoch`: steady protection of a guest that dirties scattered pages, both daemons real, over loopback TCP.

The guest is the simulated one, in its own process, at a rate that dirties about `pages` distinct pages in each
interval. Pause is from the request to pause until the guest was told to go on; commit is from that request to the
acknowledgement's arrival. CPU is user and system time of both daemons, without the guest's process.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ckptd.bench.machine import conditions, median, scratch
from ckptd.demo.children import Child, kill_guest
from ckptd.memory.dirtyset import gfns_of_bitmap
from ckptd.units import PAGE_SIZE

__all__ = ["bench_epoch"]

_PRIMARY = """
[guest]
name = "bench"
memory = "{memory}B"
workload = "uniform"
dirty_rate = {rate}
tracker = "{tracker}"
[secondary]
address = "127.0.0.1:{port}"
[checkpoint]
interval = "{interval}ms"
level = "{level}"
encoding = "{encoding}"
[runtime]
dir = "{runtime}"
log_level = "warning"
"""
_SECONDARY = """
[listen]
address = "127.0.0.1:{port}"
[replica]
dir = "{replica}"
[[guest]]
name = "bench"
[runtime]
dir = "{runtime}"
log_level = "warning"
"""


def bench_epoch(
    *, memory_bytes: int, pages: int, seconds: float, interval_ms: int = 10, tracker: str = "bitmap",
    level: str = "memory", encoding: str = "raw", sizes: tuple[int, ...] = (), say: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """One steady run at `memory_bytes`, and a short one at each of `sizes` for the growth of the pause."""
    settings = {"interval": interval_ms, "tracker": tracker, "level": level, "encoding": encoding}
    rate = pages * 1000 // interval_ms
    say(f"{memory_bytes >> 20} MiB for {seconds:g} s")
    steady = _Run(memory_bytes, rate, settings).measure(seconds)
    growth = []
    for size in sizes:
        say(f"{size >> 20} MiB for the pause")
        run = _Run(size, rate, settings).measure(min(seconds, 10.0))
        growth.append({
            "memory_bytes": size, "pause_ms_p50": run["pause_ms_p50"],
            "dirty_pages_per_epoch": run["dirty_pages_per_epoch"],
            "tracker_scan_ms": round(_scan_ms(size), 4),
        })  # fmt: skip
    limits = {"pause_ms_p50": 1.5, "commit_ms_p50": 5.0, "commit_ms_p99": 15.0, "cpu_us_per_dirty_page": 5.0}
    return {
        "bench": "epoch", **steady, "limits": limits,
        "met": {key: steady[key] <= limit for key, limit in limits.items()},
        "pause_by_size": growth, "memory_bytes": memory_bytes, "interval_ms": interval_ms, "level": level,
        "encoding": encoding, "tracker": tracker,
        "conditions": {**conditions(), "workload": "uniform", "history": 100, "transport": "loopback TCP"},
    }  # fmt: skip


class _Run:
    """A secondary, a primary and a guest of one size."""

    def __init__(self, memory_bytes: int, rate: int, settings: dict[str, Any]) -> None:
        self._memory, self._rate, self._settings = memory_bytes, rate, settings

    def measure(self, seconds: float) -> dict[str, Any]:
        base = Path(tempfile.mkdtemp(prefix="ckptd-bench-", dir=scratch(self._memory + (2 << 30))))
        port = _free_port()
        files = {"primary": _PRIMARY, "secondary": _SECONDARY}
        children: list[Child] = []
        try:
            for role, text in files.items():
                (base / role).mkdir()
                (base / f"{role}.toml").write_text(
                    text.format(
                        memory=self._memory, rate=self._rate, port=port, replica=base / "replica",
                        runtime=base / role, **self._settings,
                    )
                )  # fmt: skip
            secondary, primary = (
                Child(role, base / f"{role}.toml", base / role / f"{role}.sock", base / f"{role}.log")
                for role in ("secondary", "primary")
            )
            for child in (secondary, primary):
                children.append(child)
                child.start()
                child.wait_ready()
            return self._watch(primary, secondary, seconds)
        finally:
            for child in reversed(children):
                child.end()
            kill_guest(base / "primary")
            kill_guest(base / "secondary" / "bench")
            shutil.rmtree(base, ignore_errors=True)

    def _watch(self, primary: Child, secondary: Child, seconds: float) -> dict[str, Any]:
        until = time.monotonic() + 120
        while primary.status()["epoch"] < 200 and time.monotonic() < until:  # history is full, segments are recycled
            primary.check()
            time.sleep(0.2)
        # Every page of the guest has been touched once, or nearly: no first faults in what is measured.
        time.sleep(min(15.0, 1.5 * self._memory / PAGE_SIZE / self._rate))
        processes = [psutil.Process(child.pid) for child in (primary, secondary)]
        before, cpu, own, began = primary.status(), _cpu(processes), _own(primary, secondary), time.monotonic()
        time.sleep(seconds)
        after, took = primary.status(), time.monotonic() - began
        cpu_seconds = _cpu(processes) - cpu
        epochs, dirty = (after[key] - before[key] for key in ("epochs_committed", "dirty_pages"))
        pause, commit = after["pause_ms"], after["commit_ms"]
        return {
            "pause_ms_p50": pause["p50"], "pause_ms_p99": pause["p99"], "commit_ms_p50": commit["p50"],
            "commit_ms_p99": commit["p99"], "epochs_per_second": round(epochs / took, 2),
            "dirty_pages_per_epoch": round(dirty / max(epochs, 1), 1),
            "cpu_us_per_dirty_page": round(cpu_seconds * 1e6 / max(dirty, 1), 3),
            "rss_growth_mib": round((_own(primary, secondary) - own) / (1 << 20), 2), "seconds": round(took, 1),
            "epochs_rolled_back": after["epochs_rolled_back"], "wire_bytes": after["wire_bytes"] - before["wire_bytes"],
        }  # fmt: skip


def _cpu(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return float(sum(one.user + one.system for one in times))


def _own(*children: Child) -> int:
    return sum(child.private_bytes for child in children)


def _scan_ms(memory_bytes: int) -> float:
    """The tracker's own scan: the bitmap of so much memory with 1,000 bits set."""
    pages = memory_bytes // PAGE_SIZE
    words = np.zeros((pages + 63) // 64, dtype=np.uint64)
    rng = np.random.default_rng(3)
    words[rng.integers(0, len(words), 1000)] |= np.uint64(1) << rng.integers(0, 64, 1000, dtype=np.uint64)
    times = []
    for _ in range(30):
        began = time.perf_counter()
        gfns_of_bitmap(words, pages)
        times.append((time.perf_counter() - began) * 1e3)
    return median(times)


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
