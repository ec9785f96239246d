"""The VMM's process as a daemon sees it: harvest and copy, death of either side, console, and the standby."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptd.errors import GuestError, StateError, TrackerUnavailable
from ckptd.guests.kvm import KvmGuest, KvmStandby
from ckptd.guests.kvm.differences import differing
from ckptd.guests.kvm.machine import TRACKERS
from ckptd.guests.kvm.model import batches_of, predict
from ckptd.guests.kvm.spec import KvmSpec
from ckptd.guests.kvm.state import decode
from ckptd.guests.process.shared import make_file, map_file
from ckptd.memory.dirtyset import DirtySet
from ckptd.memory.regions import Geometry
from ckptd.units import PAGE_SIZE

from .machines import needs_kvm, ring_here

pytestmark = [pytest.mark.kvm, needs_kvm]

SPEC = KvmSpec(Geometry.of(ram=1200, video=70), vcpus=2, output_every=4, rate=200_000)


async def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "in vain"
        await asyncio.sleep(0.002)


def with_guest(
    runtime: Path, work: Callable[[KvmGuest], Coroutine[Any, Any, None]], spec: KvmSpec = SPEC, **options: Any
) -> None:
    """Attach, do it, and end the guest."""

    async def run() -> None:
        guest = KvmGuest("vm", spec, runtime, **options)
        await guest.attach()
        try:
            await work(guest)
        finally:
            await guest.end()

    asyncio.run(run())


def copied(guest: KvmGuest, dirty: DirtySet, image: list[np.ndarray]) -> None:  # type: ignore[type-arg]
    assert not dirty.overflowed
    for region, gfns in enumerate(dirty.gfns):
        rows = np.empty((len(gfns), PAGE_SIZE), dtype=np.uint8)
        guest.read_pages(region, gfns, rows)
        image[region][gfns] = rows


def empty_image(spec: KvmSpec = SPEC) -> list[np.ndarray]:  # type: ignore[type-arg]
    return [np.zeros((region.pages, PAGE_SIZE), dtype=np.uint8) for region in spec.geometry]


def right(image: list[np.ndarray], spec: KvmSpec = SPEC) -> bool:  # type: ignore[type-arg]
    return differing(predict(spec, batches_of(spec, image)), image, spec) == []


@pytest.mark.parametrize("tracker", ["auto", *TRACKERS])
def test_a_copy_by_harvests_is_the_guest(tracker: str, runtime: Path) -> None:
    if tracker == "kvm-ring" and (why := ring_here()):
        pytest.skip(why)

    async def work(guest: KvmGuest) -> None:
        image = empty_image()
        await guest.pause()
        guest.tracker.start()
        copied(guest, DirtySet.everything(SPEC.geometry), image)
        for _ in range(15):
            await guest.resume()
            await asyncio.sleep(0.004)
            copied(guest, guest.tracker.harvest(), image)
            await guest.pause()
            dirty = guest.tracker.harvest()
            guest.tracker.restore(dirty)
            copied(guest, guest.tracker.harvest(), image)
            assert all(np.array_equal(mine, live) for mine, live in zip(image, guest.memory, strict=True))
        await guest.resume()
        await guest.pause_at_marks()
        copied(guest, guest.tracker.harvest(), image)
        assert right(image)
        state = decode(await guest.save_state())
        assert state.spec == SPEC and state.written == guest.gate.written
        assert guest.tracker.name == (tracker if tracker != "auto" else guest.facts()["tracker"])

    with_guest(runtime, work, tracker=tracker)


@pytest.mark.parametrize("paused", [False, True])
def test_the_guest_outlives_its_daemon_and_holds_its_output(paused: bool, runtime: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"

    async def work(_: KvmGuest) -> None:
        first = KvmGuest("vm", SPEC, runtime / "own", tracker="kvm-ring" if not ring_here() else "auto", output=output)
        await first.attach()
        await first.pause()
        first.tracker.start()
        if not paused:
            await first.resume()
        run = first.run
        await first.detach()  # to the process, that is the death of its daemon
        again = KvmGuest("vm", SPEC, runtime / "own", tracker="kvm-bitmap", output=output)
        before = -1
        for _ in range(2):
            await again.attach()
            assert again.resumed and again.run == run and again.gate.released == 0
            assert int(str(again.facts()["steps"])) > before
            before = int(str(again.facts()["steps"]))
            await again.detach()
            await asyncio.sleep(0.1)
        await again.attach()
        try:
            image = empty_image()
            await again.pause()
            again.tracker.start()
            copied(again, DirtySet.everything(SPEC.geometry), image)
            await again.resume()
            assert not output.exists()
            await again.pause_at_marks()
            copied(again, again.tracker.harvest(), image)
            assert right(image)
            again.gate.release(again.gate.mark())
            expected = predict(SPEC, batches_of(SPEC, image)).lines
            said = output.read_bytes().splitlines(keepends=True)
            assert sorted(said) == sorted(line for one in expected for line in one)
        finally:
            await again.end()

    with_guest(runtime, work)


def test_one_daemon_at_a_time_and_one_guest_in_a_place(runtime: Path) -> None:
    async def work(guest: KvmGuest) -> None:
        with pytest.raises(GuestError, match="another daemon is attached"):
            await KvmGuest("vm", SPEC, runtime).attach()
        await guest.detach()
        other = KvmSpec(SPEC.geometry, "patterns", 2, output_every=4, rate=200_000)
        with pytest.raises(GuestError, match="wanted program patterns and not random"):
            await KvmGuest("vm", other, runtime).attach()
        await guest.attach()
        with pytest.raises(StateError, match="attached already"):
            await guest.attach()

    with_guest(runtime, work)


def test_a_ring_that_is_too_small_or_a_tracker_that_is_none_is_refused_and_the_guest_goes_on(runtime: Path) -> None:
    async def work(guest: KvmGuest) -> None:
        await guest.detach()
        for tracker, entries, said in (("kvm-ring", 1 << 20, "at most"), ("bitmap", 4096, "no tracker")):
            if tracker == "kvm-ring" and ring_here():
                continue
            with pytest.raises(GuestError, match=said):
                await KvmGuest("vm", SPEC, runtime, tracker=tracker, ring_entries=entries).attach()
        await guest.attach()
        before = int(str(guest.facts()["steps"]))
        await until(lambda: int(str(guest.facts()["steps"])) > before or guest.gate.full)

    with_guest(runtime, work)


def test_a_killed_vmm_is_noticed(runtime: Path) -> None:
    async def work(guest: KvmGuest) -> None:
        assert guest.alive()
        os.kill(int(str(guest.facts()["pid"])), signal.SIGKILL)
        await until(lambda: not guest.alive())
        with pytest.raises(GuestError, match="has ended"):
            await guest.pause()

    with_guest(runtime, work)


def test_a_ring_asks_for_attention_before_it_is_full(runtime: Path) -> None:
    if why := ring_here():
        pytest.skip(why)
    spec = KvmSpec(Geometry.of(ram=40_000), vcpus=1, rate=60_000, output_every=10**6)

    async def work(guest: KvmGuest) -> None:
        await guest.pause()
        guest.tracker.start()
        await guest.resume()
        attention = guest.attention()
        assert attention is not None
        for _ in range(3):
            assert await asyncio.to_thread(select.select, [attention], [], [], 20) != ([], [], [])
            dirty = guest.tracker.harvest()
            # An emulating KVM logs a page at each of its writes, so the ring holds some pages several times.
            assert dirty.pages > 4096 // 8 and not dirty.overflowed
            guest.clear_attention()
        assert guest.facts()["log_losses"] == 0

    with_guest(runtime, work, spec, tracker="kvm-ring", ring_entries=8192)


def test_a_guest_that_stops_says_why_in_the_status(runtime: Path) -> None:
    spec = KvmSpec(Geometry.of(ram=100), "patterns", rate=100_000)

    async def work(guest: KvmGuest) -> None:
        pid = int(str(guest.facts()["pid"]))
        ram = next(fd for fd in Path(f"/proc/{pid}/fd").iterdir() if "ckptd-ram" in os.readlink(fd))
        fd = os.open(ram, os.O_RDWR)
        memory = map_file(fd)
        os.close(fd)
        await until(memory[60 * PAGE_SIZE : 61 * PAGE_SIZE].any)  # what it never wrote it does not check
        await guest.pause()
        for page in (50, 60):  # that say another round than they should; it may be just writing one of them
            memory[page * PAGE_SIZE + 4 : page * PAGE_SIZE + 8] = 255
        await guest.resume()
        await until(lambda: guest.facts()["note"])
        assert str(guest.facts()["note"]).startswith("the guest runs no more: vCPU 0: the program reports a fault at")
        await guest.pause()
        assert decode(await guest.save_state()).stopped

    with_guest(runtime, work, spec)


# --- the console


class Client:
    def __init__(self, runtime: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        fd = os.open(runtime, os.O_PATH)
        self.sock.connect(f"/proc/self/fd/{fd}/console.sock")
        os.close(fd)
        self.sock.settimeout(20)

    def line(self) -> bytes:
        found = b""
        while not found.endswith(b"\n"):
            found += self.sock.recv(1)
        return found


def test_the_console_answers_only_what_was_released(runtime: Path) -> None:
    spec = KvmSpec(Geometry.of(ram=100), "kv", vcpus=2)

    async def work(guest: KvmGuest) -> None:
        one, other = Client(runtime), Client(runtime)
        one.sock.sendall(b"S 00000001 00000005 0000abcd\n")
        await until(lambda: guest.gate.held(guest.gate.written).endswith(b"\n"))
        await asyncio.sleep(0.05)
        assert select.select([one.sock, other.sock], [], [], 0)[0] == []
        guest.gate.release(guest.gate.written)
        for client in (one, other):
            assert await asyncio.to_thread(client.line) == b"= 00000001 00000005 0000abcd 00000001\n"
        other.sock.close()
        one.sock.sendall(b"G 00000002 00000005\n")
        await until(lambda: guest.gate.held(guest.gate.written).endswith(b"\n"))
        guest.gate.release(guest.gate.written)
        assert await asyncio.to_thread(one.line) == b"= 00000002 00000005 0000abcd 00000001\n"

    with_guest(runtime, work, spec)


def test_input_that_was_not_fetched_is_part_of_the_state_and_is_bounded(runtime: Path) -> None:
    async def work(guest: KvmGuest) -> None:
        client = Client(runtime)
        client.sock.setblocking(False)
        sent = 0
        end = time.monotonic() + 2
        while time.monotonic() < end and sent < 1 << 22:
            try:
                sent += client.sock.send(b"nobody reads this\n" * 64)
            except BlockingIOError:
                await asyncio.sleep(0.01)
        await guest.pause()
        kept = decode(await guest.save_state()).input
        assert len(kept) == 1 << 16 and sent < 1 << 22
        assert kept.startswith(b"nobody reads this\n")

    with_guest(runtime, work)


# --- the standby


async def checkpoint(guest: KvmGuest) -> tuple[bytes, bytes, int, list[int]]:
    """State, held output, released, and image files, of the paused guest."""
    files = []
    for region, rows in zip(guest.geometry, guest.memory, strict=True):
        files.append(make_file(region.name, region.size_bytes))
        map_file(files[-1])[:] = rows.reshape(-1)
    gate = guest.gate
    return await guest.save_state(), gate.held(gate.mark()), gate.released, files


def test_a_standby_goes_on_and_lets_go_of_what_was_held(runtime: Path, tmp_path: Path) -> None:
    output = tmp_path / "there"

    async def work(guest: KvmGuest) -> None:
        standby = KvmStandby("vm", runtime / "standby", output)
        await standby.prepare()
        await until(lambda: guest.gate.written > 100)
        await guest.pause()
        guest.gate.release(60)
        state, held, released, files = await checkpoint(guest)
        try:
            await standby.activate(SPEC.geometry, files, state, held, released)
            with pytest.raises(StateError, match="runs on this side already"):
                await standby.activate(SPEC.geometry, files, state, held, released)
            assert output.read_bytes().startswith(held) and len(held) == guest.gate.written - 60
            steps = int(str(standby.facts()["steps"]))
            await until(lambda: int(str(standby.facts()["steps"])) > steps + 20)
            await until(lambda: len(output.read_bytes()) > len(held))
        finally:
            await standby.end()

    with_guest(runtime, work)


def test_a_standby_refuses_what_does_not_fit_and_can_still_be_used(runtime: Path, tmp_path: Path) -> None:
    async def work(guest: KvmGuest) -> None:
        standby = KvmStandby("vm", runtime / "standby", tmp_path / "there")
        await guest.pause()
        state, held, released, files = await checkpoint(guest)
        damaged = bytearray(state)
        damaged[len(state) // 2] ^= 1
        small = [make_file("small", PAGE_SIZE), files[1]]
        geometry = SPEC.geometry
        try:
            for wrong, said in (
                ((geometry, files, bytes(damaged), held, released), "damaged"),
                ((Geometry.of(ram=1200), files, state, held, released), "the state is of a guest of"),
                ((geometry, files, state, held + b"x", released), "the gate"),
                ((geometry, small, state, held, released), "is not that of"),
                ((geometry, files[:1], state, held, released), "1 descriptors for 2 regions"),
            ):
                with pytest.raises(GuestError, match=said):
                    await standby.activate(*wrong)  # type: ignore[arg-type]
                assert not standby.active and standby.alive()
            (tmp_path / "there").unlink(missing_ok=True)
            await standby.activate(geometry, files, state, held, released)
            assert standby.active
        finally:
            await standby.end()

    with_guest(runtime, work)


def test_a_host_without_kvm_is_no_standby(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> int:
        raise TrackerUnavailable("/dev/kvm cannot be opened: No such file or directory", hint="load a module")

    monkeypatch.setattr("ckptd.guests.kvm.standby.open_kvm", nothing)
    with pytest.raises(TrackerUnavailable, match="cannot be opened"):
        asyncio.run(KvmStandby("vm", runtime).prepare())
    assert not (runtime / "guest.sock").exists()
