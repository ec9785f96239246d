"""Real guest processes: what is harvested and copied is what the guest is, whatever happens to the daemon."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptd.errors import GuestError, StateError
from ckptd.guests.process import link
from ckptd.guests.sim import SimGuest
from ckptd.guests.sim.gate import RECORD_SIZE, outputs_of
from ckptd.guests.sim.machine import Params, header_of
from ckptd.guests.sim.oracle import run_to
from ckptd.memory.dirtyset import DirtySet
from ckptd.memory.regions import Geometry
from ckptd.units import PAGE_SIZE

GEOMETRY = Geometry.of(low=40, ram=1500, rom=1)


def make(runtime: Path, *, settings: dict[str, Any] | None = None, **params: Any) -> SimGuest:
    wanted = {"geometry": GEOMETRY, "seed": 11, "vcpus": 2, "output_every": 50, **params}
    return SimGuest("one", Params(**wanted), runtime, **(settings or {}))


async def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, "it never happened"
        await asyncio.sleep(0.001)


def steps_of(guest: SimGuest) -> int:
    steps = guest.facts()["steps"]
    assert isinstance(steps, int)
    return steps


async def some_steps(guest: SimGuest, count: int = 20) -> None:
    wanted = steps_of(guest) + count
    await until(lambda: steps_of(guest) >= wanted)


def copy_pages(guest: SimGuest, dirty: DirtySet, image: list[np.ndarray[Any, np.dtype[np.uint8]]]) -> None:
    for region, gfns in dirty.batches(1000):
        rows = np.empty((len(gfns), PAGE_SIZE), dtype=np.uint8)
        guest.read_pages(region, gfns, rows)
        image[region][gfns] = rows


def new_image() -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    return [np.zeros((region.pages, PAGE_SIZE), dtype=np.uint8) for region in GEOMETRY]


def same(image: list[np.ndarray[Any, np.dtype[np.uint8]]], params: Params, state: bytes) -> bool:
    """The image and the state are those of a guest that was never interrupted."""
    wanted = run_to(params, header_of(state).step)
    return state == wanted.state and all(np.array_equal(a, b) for a, b in zip(image, wanted.memory, strict=True))


@pytest.mark.parametrize("workload", ["uniform", "kv", "bursts"])
@pytest.mark.parametrize("tracker", ["bitmap", "ring"])
def test_an_image_of_harvested_pages_alone_is_the_guest_at_every_epoch(
    tracker: str, workload: str, runtime: Path
) -> None:
    async def run() -> None:
        guest = make(runtime, settings={"tracker": tracker, "ring_entries": 1024}, workload=workload)
        await guest.attach()
        try:
            image = new_image()
            await guest.pause()
            guest.tracker.start()
            copy_pages(guest, DirtySet.everything(GEOMETRY), image)
            for epoch in range(30):
                wanted = steps_of(guest) + 5  # a ring of 1,024 is full after 16 steps of its vCPU
                await guest.resume()
                await until(lambda wanted=wanted: steps_of(guest) >= wanted)  # type: ignore[misc]
                if not guest.tracker.needs_pause:
                    dirty = guest.tracker.harvest()
                    assert not dirty.overflowed
                    copy_pages(guest, dirty, image)
                await guest.pause()
                dirty = guest.tracker.harvest()
                assert not dirty.overflowed
                copy_pages(guest, dirty, image)
                guest.gate.release(guest.gate.mark())
                if epoch % 10 == 9:
                    assert same(image, guest.params, await guest.save_state())
        finally:
            await guest.end()

    asyncio.run(run())


def test_a_full_ring_stalls_the_guest_and_asks_for_attention(runtime: Path) -> None:
    async def run() -> None:
        guest = make(runtime, settings={"tracker": "ring", "ring_entries": 256})
        await guest.attach()
        try:
            await guest.pause()
            guest.tracker.start()
            image = new_image()
            copy_pages(guest, DirtySet.everything(GEOMETRY), image)
            await guest.resume()
            attention = guest.attention()
            assert attention is not None
            for _ in range(20):
                assert select.select([attention], [], [], 10)[0]
                before = guest.facts()["steps"]
                await asyncio.sleep(0.003)
                assert guest.facts()["steps"] == before
                guest.clear_attention()
                dirty = guest.tracker.harvest()  # which lets it go on, without a pause
                assert dirty.pages and not dirty.overflowed
                copy_pages(guest, dirty, image)
                guest.clear_attention()
            await guest.pause()
            copy_pages(guest, guest.tracker.harvest(), image)
            assert same(image, guest.params, await guest.save_state())
        finally:
            await guest.end()

    asyncio.run(run())


def test_a_full_gate_stalls_and_what_leaves_is_what_the_guest_says(runtime: Path, tmp_path: Path) -> None:
    async def run() -> None:
        file = tmp_path / "output"
        guest = make(runtime, settings={"gate_capacity": 4 * RECORD_SIZE, "output": file}, output_every=1)
        await guest.attach()
        try:
            attention = guest.attention()
            assert attention is not None
            for turn in range(1, 6):
                assert select.select([attention], [], [], 10)[0]
                await until(lambda: guest.gate.full)
                assert guest.gate.written == 4 * turn
                assert not file.exists() or len(file.read_text().splitlines()) == 4 * (turn - 1)
                await guest.pause()
                mark = guest.gate.mark()
                assert [one.number for one in outputs_of(guest.gate.held(mark))] == list(range(mark - 3, mark + 1))
                guest.clear_attention()
                assert guest.gate.release(mark) == 4
                await guest.resume()
            wanted = [f"{one.number} {one.step} {one.content.hex()}" for one in run_to(guest.params, 20).outputs]
            assert file.read_text().splitlines() == wanted
        finally:
            await guest.end()

    asyncio.run(run())


DAEMON = """
import asyncio, sys, time
from pathlib import Path
from ckptd.guests.sim import SimGuest
from ckptd.guests.sim.machine import Params
from ckptd.memory.regions import Geometry

async def main():
    params = Params(Geometry.of(low=40, ram=1500, rom=1), seed=11, vcpus=2, output_every=50)
    guest = SimGuest("one", params, Path(sys.argv[1]), tracker="ring", ring_entries=256, output=Path(sys.argv[2]))
    await guest.attach()
    await guest.pause()
    guest.tracker.start()
    if sys.argv[3] == "running":
        await guest.resume()
    print("ready", flush=True)
    time.sleep(60)

asyncio.run(main())
"""


def seen_from_outside(runtime: Path) -> int:
    """The step in the control page of the process, without attaching to it."""
    for fd in Path(f"/proc/{(runtime / 'guest.pid').read_text().strip()}/fd").iterdir():
        if "ckptd-control" in os.readlink(fd):
            return int(np.fromfile(fd, dtype=np.uint64, count=9)[8])
    raise AssertionError("the process has no control page")


@pytest.mark.parametrize("moment", ["running", "paused"])
def test_the_guest_outlives_a_killed_daemon_and_holds_its_output(moment: str, runtime: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    daemon = subprocess.Popen(
        [sys.executable, "-c", DAEMON, str(runtime), str(output), moment], stdout=subprocess.PIPE, text=True
    )
    try:
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == "ready\n"
    finally:
        daemon.kill()
        daemon.communicate()

    async def run() -> None:
        # it was stuck on its ring, or paused; nobody harvests any more, so neither holds it
        before = seen_from_outside(runtime)
        await until(lambda: seen_from_outside(runtime) > before + 100)
        guest = make(runtime, settings={"output": output})
        await guest.attach()  # with another tracker than the daemon before had
        try:
            assert guest.resumed
            await guest.pause()
            guest.tracker.start()
            image = new_image()
            copy_pages(guest, DirtySet.everything(GEOMETRY), image)
            await guest.resume()
            await some_steps(guest)
            await guest.pause()
            copy_pages(guest, guest.tracker.harvest(), image)
            assert same(image, guest.params, await guest.save_state())
            assert not output.exists()
            assert guest.gate.released == 0
            assert guest.gate.release(guest.gate.mark()) > 0
            numbers = [int(line.split()[0]) for line in output.read_text().splitlines()]
            assert numbers == list(range(1, guest.gate.mark() + 1))
        finally:
            await guest.end()

    asyncio.run(run())


def test_detach_leaves_it_running_and_end_leaves_nothing(runtime: Path) -> None:
    async def run() -> None:
        guest = make(runtime)
        await guest.attach()
        assert not guest.resumed
        pid = guest.facts()["pid"]
        assert isinstance(pid, int)
        assert (runtime / "guest.pid").read_text() == f"{pid}\n"
        with pytest.raises(StateError, match="attached already"):
            await guest.attach()
        await some_steps(guest)
        await guest.detach()
        assert not guest.alive()
        await guest.attach()
        assert guest.facts()["pid"] == pid
        await some_steps(guest)
        await guest.end()
        await guest.end()
        assert not (runtime / "guest.pid").exists()
        assert not (runtime / "guest.sock").exists()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    asyncio.run(run())


@pytest.mark.parametrize("rate", [0, 10**9])
def test_a_guest_that_never_waits_still_listens(rate: int, runtime: Path) -> None:
    async def run() -> None:
        guest = make(runtime, rate=rate, vcpus=1)
        for _ in range(3):
            await guest.attach()
            await some_steps(guest)
            await guest.detach()
        await guest.attach()
        await guest.end()
        assert not (runtime / "guest.pid").exists()

    asyncio.run(run())


def test_a_run_has_an_identity_that_another_run_has_not(runtime: Path) -> None:
    async def run() -> None:
        guest = make(runtime)
        await guest.attach()
        first = guest.run
        await guest.detach()
        await guest.attach()
        assert guest.run == first
        await guest.end()
        await guest.attach()
        assert guest.run != first
        await guest.end()

    asyncio.run(run())


def test_one_daemon_at_a_time(runtime: Path) -> None:
    async def run() -> None:
        guest = make(runtime)
        await guest.attach()
        try:
            with pytest.raises(GuestError, match="another daemon"):
                await make(runtime).attach()
            await some_steps(guest)
        finally:
            await guest.end()

    asyncio.run(run())


def test_another_guest_in_the_same_place_is_refused_and_left_alone(runtime: Path) -> None:
    async def run() -> None:
        guest = make(runtime)
        await guest.attach()
        await guest.detach()
        with pytest.raises(GuestError, match=r"seed 12 and not 11, workload kv and not uniform"):
            await make(runtime, seed=12, workload="kv").attach()
        await guest.attach()
        assert guest.resumed
        await guest.end()

    asyncio.run(run())


def test_a_killed_guest_is_noticed_and_a_new_one_starts_in_its_place(runtime: Path) -> None:
    async def run() -> None:
        guest = make(runtime)
        await guest.attach()
        pid = guest.facts()["pid"]
        assert isinstance(pid, int)
        assert guest.alive()
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not guest.alive())
        with pytest.raises(GuestError, match="ended"):
            await guest.pause()
        await guest.end()
        await guest.attach()
        assert not guest.resumed
        await some_steps(guest)
        await guest.end()

    asyncio.run(run())


def test_a_stuck_guest_does_not_stop_the_daemon(runtime: Path) -> None:
    async def run() -> None:
        guest = make(runtime)
        await guest.attach()
        pid = guest.facts()["pid"]
        assert isinstance(pid, int)
        try:
            os.kill(pid, signal.SIGSTOP)
            pausing = asyncio.create_task(guest.pause())
            for _ in range(20):
                await asyncio.sleep(0.001)
            assert not pausing.done()
            os.kill(pid, signal.SIGCONT)
            await pausing
            assert header_of(await guest.save_state()).step == steps_of(guest)
        finally:
            os.kill(pid, signal.SIGCONT)
            await guest.end()

    asyncio.run(run())


def test_a_guest_that_is_stuck_for_good_can_be_ended(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        guest = make(runtime)
        await guest.attach()
        await guest.detach()
        monkeypatch.setattr(link, "_TIMEOUT", 0.5)
        monkeypatch.setattr(link, "_END_WAIT", 0.1)
        await guest.attach()
        pid = guest.facts()["pid"]
        assert isinstance(pid, int)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(GuestError, match="does not answer"):
            await guest.pause()
        with pytest.raises(GuestError, match="ended"):
            await guest.pause()
        await guest.end()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    asyncio.run(run())


def test_calls_out_of_order_are_refused(runtime: Path) -> None:
    async def run() -> None:
        guest = make(runtime)
        with pytest.raises(StateError, match="not attached"):
            await guest.pause()
        await guest.attach()
        try:
            with pytest.raises(StateError, match="not paused"):
                await guest.resume()
            with pytest.raises(StateError, match="while the guest is paused"):
                await guest.save_state()
            await guest.pause()
            with pytest.raises(StateError, match="paused already"):
                await guest.pause()
            steps = guest.facts()["steps"]
            await asyncio.sleep(0.01)
            assert guest.facts()["steps"] == steps
        finally:
            await guest.end()

    asyncio.run(run())


def test_a_daemon_cannot_write_guest_memory_by_mistake(runtime: Path) -> None:
    async def run() -> None:
        guest = make(runtime)
        await guest.attach()
        try:
            with pytest.raises(ValueError, match="read-only"):
                guest.memory[0][0, 0] = 1
        finally:
            await guest.end()

    asyncio.run(run())


def test_a_guest_that_cannot_be_made_says_why_and_leaves_no_process(runtime: Path) -> None:
    async def run() -> None:
        geometry = Geometry.of(**{f"r{number}": 1 for number in range(241)})
        with pytest.raises(GuestError, match="at most 240 regions"):
            await make(runtime, geometry=geometry).attach()
        assert not (runtime / "guest.pid").exists()

    asyncio.run(run())
