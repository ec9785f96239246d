"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

__all__ = ["conditions", "median", "scratch"]


def conditions() -> dict[str, object]:
    """CPU, cores, memory, kernel, Python and load of this machine."""
    cpu = next((line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    memory = next((int(line.split()[1]) >> 20 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "cpu": cpu, "cores": os.cpu_count(), "memory_gib": memory, "kernel": platform.release(),
        "python": platform.python_version(), "load": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def median(values: list[float]) -> float:
    """The middle one, or the mean of the two in the middle."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def scratch(size_bytes: int) -> str | None:
    """A directory for replicas of this size: memory where it has room, else what tempfile chooses."""
    shm = Path("/dev/shm")
    if shm.is_dir():
        found = os.statvfs(shm)
        if found.f_bavail * found.f_frsize > 2 * size_bytes + (256 << 20):
            return str(shm)
    return None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
