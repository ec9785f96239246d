"""`ckptd bench link`: the first image of a guest, beside a plain sender and receiver of the same bytes.

Two processes over loopback TCP. Ours is the real primary daemon with a guest that stands still, and the real secondary
daemon; the plain pair sends from the same memory and receives into the same kind of mapped image file, with the same
batch size and socket options, and hashes nothing. Rounds alternate, so that both see the same noise.
"""

from __future__ import annotations

import asyncio
import mmap
import multiprocessing
import os
import shutil
import socket
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import numpy as np

from ckptd.bench.machine import conditions, median, scratch
from ckptd.bench.still import StillGuest
from ckptd.config import PrimaryConfig, SecondaryConfig
from ckptd.daemon.link import tune
from ckptd.daemon.logs import set_up_log
from ckptd.daemon.primary import PrimaryDaemon
from ckptd.daemon.secondary import SecondaryDaemon
from ckptd.errors import CkptdError
from ckptd.memory.hashing import Rows
from ckptd.memory.regions import Geometry
from ckptd.replica.image import Image
from ckptd.units import PAGE_SIZE

__all__ = ["bench_link"]

_BUFFER = 4 << 20


def bench_link(size_bytes: int, rounds: int, batch_bytes: int) -> dict[str, Any]:
    """Rates in GB/s, and their ratio as the median of the rounds' ratios."""
    geometry = Geometry.of(ram=size_bytes // PAGE_SIZE)
    directory = Path(tempfile.mkdtemp(prefix="ckptd-bench-", dir=scratch(size_bytes)))
    context = multiprocessing.get_context("spawn")
    ours_end, theirs_end = context.Pipe()
    child = context.Process(target=_receiver, args=(theirs_end, str(directory), size_bytes // PAGE_SIZE, batch_bytes))
    child.start()
    try:
        memory = _incompressible(geometry)
        plain, first = [], []
        for _ in range(rounds):
            plain.append(_plain(ours_end, memory, batch_bytes))
            first.append(_first_image(ours_end, directory, geometry, memory, batch_bytes))
        ours_end.send(("end",))
        child.join(10)
    finally:
        if child.is_alive():
            child.kill()
        shutil.rmtree(directory, ignore_errors=True)
    gigabytes = geometry.size_bytes / 1e9
    ratios = [a / b for a, b in zip(plain, first, strict=True)]
    return {
        "bench": "link", "first_image_gbps": round(gigabytes / median(first), 3),
        "raw_loopback_gbps": round(gigabytes / median(plain), 3), "first_image_ratio": round(median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios], "target_ratio": 0.6, "met": median(ratios) >= 0.6,
        "memory_bytes": geometry.size_bytes, "batch_bytes": batch_bytes, "rounds": rounds,
        "conditions": {**conditions(), "memory": "incompressible", "transport": "loopback TCP, two processes"},
    }  # fmt: skip


def _incompressible(geometry: Geometry) -> list[Rows]:
    """Random bytes in shared memory, as a guest's are; every page differs."""
    memory = []
    rng = np.random.default_rng(7)
    for region in geometry:
        fd = os.memfd_create("ckptd-bench")
        os.ftruncate(fd, region.size_bytes)
        rows = np.frombuffer(mmap.mmap(fd, region.size_bytes), dtype=np.uint8).reshape(-1, PAGE_SIZE)
        os.close(fd)
        block = rng.integers(0, 2**63, (4096, PAGE_SIZE // 8), dtype=np.uint64)
        for start in range(0, len(rows), 4096):
            part = rows[start : start + 4096]
            part[:] = block[: len(part)].view(np.uint8)
            part.view(np.uint64)[:, 0] += np.uint64(start)
        memory.append(rows)
    return memory


# --- the plain pair


def _plain(pipe: Connection, memory: list[Rows], batch_bytes: int) -> float:
    pipe.send(("plain",))
    port = pipe.recv()
    with socket.create_connection(("127.0.0.1", port)) as sock:
        tune(sock, _BUFFER)
        sock.setblocking(True)
        began = time.perf_counter()
        for rows in memory:
            area = rows.reshape(-1).data
            for start in range(0, len(area), batch_bytes):
                sock.sendall(area[start : start + batch_bytes])
        sock.recv(1)
        return time.perf_counter() - began


def _plain_receiver(pipe: Connection, directory: Path, geometry: Geometry, batch_bytes: int) -> None:
    place = directory / "plain"
    place.mkdir(exist_ok=True)
    image = Image(place, geometry, create=True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        sock, _ = listener.accept()
    with sock:
        tune(sock, _BUFFER)
        sock.setblocking(True)
        for rows in image.rows:
            area, at = rows.reshape(-1).data, 0
            while at < len(area):
                at += sock.recv_into(area[at : at + batch_bytes])
        sock.send(b"k")
    image.close()
    image.unlink()


# --- ours


def _first_image(pipe: Connection, directory: Path, geometry: Geometry, memory: list[Rows], batch_bytes: int) -> float:
    pipe.send(("ours",))
    port = pipe.recv()
    if isinstance(port, str):
        raise CkptdError(f"the receiving daemon did not start: {port}")
    config = PrimaryConfig.model_validate(
        {
            "guest": {"name": "bench", "memory": f"{geometry.size_bytes}B"},
            "secondary": {"address": f"127.0.0.1:{port}"},
            "checkpoint": {"batch": f"{batch_bytes}B"}, "link": {"buffer": f"{_BUFFER}B", "timeout": "30s"},
            "runtime": {"dir": str(directory / "primary")},
        }
    )  # fmt: skip

    async def run() -> float:
        daemon = PrimaryDaemon(config, StillGuest("bench", geometry, memory))
        task = asyncio.create_task(daemon.run())
        while daemon.acknowledged_epoch < 1 and not task.done():
            await asyncio.sleep(0.05)
        daemon.stop()
        await task
        return daemon.resync_ms / 1e3

    took = _run(run())
    pipe.send("stop")
    pipe.recv()
    return cast(float, took)


async def _secondary(pipe: Connection, directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config = SecondaryConfig.model_validate(
        {
            "listen": {"address": f"127.0.0.1:{port}"}, "replica": {"dir": str(directory / "replica")},
            "guest": [{"name": "bench"}], "link": {"buffer": f"{_BUFFER}B", "timeout": "30s"},
            "runtime": {"dir": str(directory / "secondary")},
        }
    )  # fmt: skip
    daemon = SecondaryDaemon(config)
    task = asyncio.create_task(daemon.run())
    await asyncio.sleep(0.1)
    pipe.send(port)
    while not pipe.poll():
        await asyncio.sleep(0.05)
    pipe.recv()
    daemon.stop()
    await task
    shutil.rmtree(directory / "replica")
    pipe.send("stopped")


def _receiver(pipe: Connection, directory: str, pages: int, batch_bytes: int) -> None:
    """The other process: does what it is told until it is told to end."""
    set_up_log("error", "text")
    geometry = Geometry.of(ram=pages)
    while (command := pipe.recv())[0] != "end":
        if command[0] == "plain":
            _plain_receiver(pipe, Path(directory), geometry, batch_bytes)
        else:
            _run(_secondary(pipe, Path(directory)))


def _run(main: Any) -> Any:
    import uvloop

    return uvloop.run(main)
