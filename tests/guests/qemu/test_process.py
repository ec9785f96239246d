"""The keeper with real QEMUs: what an epoch takes, what others do meanwhile, deaths, and that nothing is left."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import time
from collections.abc import Callable, Coroutine
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptd.demo.children import kill_guest
from ckptd.errors import CkptdError, GuestError, StateError
from ckptd.guests.qemu.guest import QemuGuest
from ckptd.guests.qemu.spec import QemuSpec
from ckptd.guests.qemu.state import decode
from ckptd.memory.dirtyset import DirtySet
from ckptd.units import PAGE_SIZE

from .counting import Counting, counting, eventually
from .machines import needs_qemu

pytestmark = [pytest.mark.qemu, needs_qemu]

Image = list[np.ndarray]  # type: ignore[type-arg]


async def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "in vain"
        await asyncio.sleep(0.005)


def made(vm: Counting, *, disks: str = "refuse", ignore: tuple[str, ...] = (), **options: Any) -> QemuGuest:
    return QemuGuest("vm", QemuSpec(vm.qmp, disks, ignore), vm.runtime, **options)


def with_guest(vm: Counting, work: Callable[[QemuGuest], Coroutine[Any, Any, None]], **options: Any) -> None:
    """Attach, do it, and detach."""

    async def run() -> None:
        guest = made(vm, **options)
        await guest.attach()
        try:
            await work(guest)
        finally:
            await guest.detach()

    asyncio.run(run())


def copied(guest: QemuGuest, dirty: DirtySet, image: Image) -> None:
    for region, gfns in enumerate(dirty.gfns):
        rows = np.empty((len(gfns), PAGE_SIZE), dtype=np.uint8)
        guest.read_pages(region, gfns, rows)
        image[region][gfns] = rows


async def first(guest: QemuGuest) -> Image:
    """Everything, with the guest paused and the tracker started; it stays paused."""
    await guest.pause()
    guest.tracker.start()
    image = [np.zeros((region.pages, PAGE_SIZE), dtype=np.uint8) for region in guest.geometry]
    copied(guest, DirtySet.everything(guest.geometry), image)
    await guest.save_state()
    return image


def same(guest: QemuGuest, image: Image) -> bool:
    return all(np.array_equal(mine, live[0 : len(mine)]) for mine, live in zip(image, guest.memory, strict=True))


async def epoch(guest: QemuGuest, image: Image) -> DirtySet:
    """One epoch, released; the image is compared with memory, whole."""
    await guest.pause()
    dirty = guest.tracker.harvest()
    assert not dirty.overflowed
    copied(guest, dirty, image)
    assert len(decode(await guest.save_state()).devices) > 1000
    assert same(guest, image)
    mark = guest.gate.mark()
    await guest.resume()
    guest.gate.release(mark)
    return dirty


def footprint(vm: Counting) -> dict[str, object]:
    """All that an attachment could leave in QEMU."""
    ask, pid = vm.operator.ask, vm.pid
    links = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.append(os.readlink(fd).partition(":")[0])  # sockets and pipes have numbers
        except FileNotFoundError:
            links.append("gone")
    return {
        "objects": sorted(one["name"] for one in ask("qom-list", {"path": "/objects"})),
        "chardevs": sorted(one["label"] for one in ask("query-chardev")),
        "fdsets": ask("query-fdsets"),
        "descriptors": sorted(links),
        "status": vm.status(),
        "filters": "ckptd" in ask("human-monitor-command", {"command-line": "info network"}),
        "traced": [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "Tracer" in line],
        "protected": " uw" in Path(f"/proc/{pid}/smaps").read_text(),
    }


def nothing_is_left(vm: Counting, before: dict[str, object]) -> None:
    eventually(lambda: footprint(vm) == before or time.sleep(0.1))
    assert footprint(vm)["descriptors"] == before["descriptors"]


def consecutive(numbers: list[int]) -> bool:
    gaps = [(earlier, later) for earlier, later in pairwise(numbers) if later != earlier + 1]
    print(f"{len(numbers)} packets, gaps", gaps[:20])
    return not gaps


# --- epochs


@pytest.mark.parametrize(
    ("machine", "share", "memory", "cards"),
    [("pc", True, "16M", 2), ("q35", False, "16M", 1), ("pc", False, "5G", 0)],
)
def test_attached_under_load_again_and_again_and_nothing_is_lost_or_left(
    machine: str, share: bool, memory: str, cards: int
) -> None:
    sparse = memory == "5G"
    with counting(machine=machine, share=share, memory=memory, cards=cards, every=7 if cards else 0) as vm:
        before = footprint(vm)

        async def once(guest: QemuGuest) -> None:
            assert [region.size_bytes for region in guest.geometry][:1] == [(5 << 30) if sparse else (16 << 20)]
            if sparse:  # what it has written, not 5 GiB of zeros
                await guest.pause()
                guest.tracker.start()
                await guest.resume()
                await asyncio.sleep(0.05)
                await guest.pause()
                gfns = guest.tracker.harvest().gfns[0]
                assert 256 in gfns and set(gfns) - {256} <= set(range(512, 576)) | {7 - 1, 6}
                await guest.save_state()
                await guest.resume()
                return
            image = await first(guest)
            await guest.resume()
            for _ in range(3):
                await asyncio.sleep(0.01)
                dirty = await epoch(guest, image)
            assert 256 in dirty.gfns[0]

        for _ in range(3 if sparse else 20):
            with_guest(vm, once)
            vm.goes_on()
        nothing_is_left(vm, before)
        if cards:
            eventually(lambda: len(vm.receiver.numbers) > 100)
            vm.operator.ask("stop")
            eventually(lambda: vm.receiver.numbers[-1] >= vm.words()[2] - 1)  # one may be counted, but not sent yet
            assert consecutive(vm.receiver.numbers)


def test_two_backends_are_two_regions() -> None:
    numa = [
        "-object", "memory-backend-ram,id=a,size=8M", "-object", "memory-backend-memfd,id=b,size=8M",
        "-numa", "node,memdev=a", "-numa", "node,memdev=b",
    ]  # fmt: skip
    with counting(*numa, share=False) as vm:

        async def work(guest: QemuGuest) -> None:
            assert [(region.name, region.pages) for region in guest.geometry][:2] == [("a", 2048), ("b", 2048)]
            image = await first(guest)
            await guest.resume()
            await asyncio.sleep(0.02)
            dirty = await epoch(guest, image)
            assert 256 in dirty.gfns[0] and len(dirty.gfns[1]) == 0

        with_guest(vm, work)


# --- the gate


@pytest.fixture(scope="module")
def vm() -> Any:
    """One that sends; each test leaves it as it was."""
    with counting(cards=1, every=5) as vm:
        yield vm


def test_nothing_leaves_that_was_not_released_and_a_full_gate_stops_the_guest_and_drops_nothing() -> None:
    """More packets than QEMU itself would keep for a guest that stands."""
    with counting(cards=1, every=1, steps=1) as vm:

        async def work(guest: QemuGuest) -> None:
            gate, attention = guest.gate, guest.attention()
            assert attention is not None
            await first(guest)
            last = vm.words()[2]  # the number of the last packet that may leave
            await guest.resume()
            vm.hurry(30)
            await until(lambda: gate.full)
            assert await asyncio.to_thread(select.select, [attention], [], [], 60) != ([], [], [])
            await until(vm.stands)
            guest.clear_attention()  # it comes back while the guest waits
            assert await asyncio.to_thread(select.select, [attention], [], [], 60) != ([], [], [])
            await until(lambda: vm.receiver.numbers[-1] >= last - 1)
            assert vm.receiver.numbers[-1] <= last and gate.written > 15_000
            vm.operator.ask("cont")  # somebody who does not know why it stands
            await until(vm.stands)
            vm.hurry(1)
            await guest.pause()
            await guest.save_state()
            last = vm.words()[2]
            await guest.resume()
            assert vm.stands()
            gate.release(gate.mark())
            await until(lambda: not gate.full and vm.status() == "running")
            await until(lambda: vm.receiver.numbers[-1] >= last - 1)
            assert consecutive(vm.receiver.numbers) and vm.receiver.numbers[-1] <= last

        with_guest(vm, work, gate_capacity=1_000_000)
        vm.goes_on()
        vm.operator.ask("stop")
        eventually(lambda: vm.receiver.numbers[-1] >= vm.words()[2] - 1)  # one may be counted, but not sent yet
        assert consecutive(vm.receiver.numbers)


def test_the_daemons_death_holds_everything_and_the_next_one_goes_on() -> None:
    with counting(cards=1, every=1, steps=1) as vm:

        async def work(guest: QemuGuest) -> None:
            image = await first(guest)
            await guest.resume()
            await epoch(guest, image)
            await guest.pause()  # it dies in a pause
            await guest.save_state()
            run, released, last = guest.run, guest.gate.released, vm.words()[2]
            assert guest._attached is not None
            guest._attached.close()
            vm.goes_on()
            vm.hurry(30)
            await until(vm.stands)  # the gate is full
            assert vm.receiver.numbers[-1] <= last and vm.status() == "paused"
            vm.hurry(1)
            again = made(vm, gate_capacity=500_000)
            await again.attach()
            try:
                assert again.run == run and again.gate.released == released and again.gate.full and again.resumed
                image = await first(again)
                gate = again.gate
                gate.release(gate.mark())
                await again.resume()
                await until(lambda: vm.status() == "running")
                await epoch(again, image)
            finally:
                await again.detach()

        with_guest(vm, work, gate_capacity=500_000)
        vm.goes_on()
        vm.operator.ask("stop")
        eventually(lambda: vm.receiver.numbers[-1] >= vm.words()[2] - 1)  # one may be counted, but not sent yet
        assert consecutive(vm.receiver.numbers)


@pytest.mark.parametrize("why", ["paused", "stalled", "signal"])
def test_detached_at_any_moment_the_guest_runs_and_has_said_everything(why: str) -> None:
    with counting(cards=1, every=1, steps=1) as vm:
        before = footprint(vm)

        async def work(guest: QemuGuest) -> None:
            await first(guest)
            if why == "paused":
                return
            await guest.resume()
            if why == "stalled":
                vm.hurry(30)
                await until(lambda: guest.gate.full and vm.stands())
                vm.hurry(1)
            else:
                await asyncio.sleep(0.05)
                os.kill(int(str(guest.facts()["pid"])), signal.SIGTERM)
                await until(lambda: not guest.alive())

        with_guest(vm, work, gate_capacity=200_000)
        vm.goes_on()
        nothing_is_left(vm, before)
        vm.operator.ask("stop")
        eventually(lambda: vm.receiver.numbers[-1] >= vm.words()[2] - 1)  # one may be counted, but not sent yet
        assert consecutive(vm.receiver.numbers)


# --- the operator


def test_what_the_operator_has_stopped_stays_stopped(vm: Counting) -> None:
    before = footprint(vm)

    async def work(guest: QemuGuest) -> None:
        image = await first(guest)
        await guest.resume()
        vm.operator.ask("stop")
        await until(lambda: "someone else has paused the guest" in str(guest.facts()["note"]))
        for _ in range(3):
            await epoch(guest, image)
            assert vm.stands()
        vm.operator.ask("cont")
        vm.goes_on()
        await until(lambda: not guest.facts()["note"])
        await epoch(guest, image)
        vm.goes_on()
        vm.operator.ask("stop")

    with_guest(vm, work)
    assert vm.stands()

    async def waits() -> None:
        guest = made(vm)
        task = asyncio.create_task(guest.attach())
        await until(lambda: "someone else has paused" in str(guest.facts().get("waits_for")))
        assert vm.stands()
        vm.operator.ask("cont")
        await task
        await guest.detach()

    asyncio.run(waits())
    vm.goes_on()
    nothing_is_left(vm, before)


@pytest.mark.parametrize("stopped", [False, True])
def test_an_epoch_in_which_somebody_let_the_guest_go_on_is_void(stopped: bool, vm: Counting) -> None:
    async def work(guest: QemuGuest) -> None:
        image = await first(guest)
        await guest.resume()
        for _ in range(2):
            if stopped:
                vm.operator.ask("stop")
            await guest.pause()
            vm.operator.ask("cont")
            vm.goes_on()
            if stopped:  # again: it stands, but not as it stood
                vm.operator.ask("stop")
                vm.operator.ask("cont")
            with pytest.raises(GuestError, match="this epoch is void"):
                await guest.save_state()
            await guest.resume()
            vm.goes_on()
        await guest.pause()
        vm.operator.ask("system_reset")
        await until(lambda: any(event["event"] == "RESET" for event in vm.operator.events) or vm.status() == "")
        with pytest.raises(GuestError, match="this epoch is void"):
            await guest.save_state()
        await guest.resume()
        vm.goes_on()
        guest.tracker.start()
        image = await again(guest)
        await epoch(guest, image)

    async def again(guest: QemuGuest) -> Image:
        image = await first(guest)
        await guest.resume()
        return image

    with_guest(vm, work)


def test_states_that_do_not_pass_are_refused_in_words() -> None:
    with counting("-no-shutdown") as vm:

        async def work(guest: QemuGuest) -> None:
            image = await first(guest)
            await guest.resume()
            vm.operator.ask("human-monitor-command", {"command-line": "o /w 0x604 0x2000"})  # ACPI: power off
            await until(lambda: vm.status() == "shutdown")
            await until(lambda: "the guest has shut down" in str(guest.facts()["note"]))
            await epoch(guest, image)
            assert vm.status() == "shutdown"

        vm.operator.ask("human-monitor-command", {"command-line": "o /4 0xcf8 0x80000b40"})  # the PM's base: 0x600
        vm.operator.ask("human-monitor-command", {"command-line": "o /4 0xcfc 0x601"})
        vm.operator.ask("human-monitor-command", {"command-line": "o /4 0xcf8 0x80000b80"})
        vm.operator.ask("human-monitor-command", {"command-line": "o /1 0xcfc 1"})
        with_guest(vm, work)
        with pytest.raises(GuestError, match="the guest has shut down; reset it"):
            asyncio.run(made(vm).attach())
        assert not (vm.runtime / "guest.sock").exists()


# --- deaths


def test_a_killed_qemu_is_noticed_and_named() -> None:
    with counting() as vm:

        async def work(guest: QemuGuest) -> None:
            await first(guest)
            await guest.resume()
            assert guest.alive()
            os.kill(vm.pid, signal.SIGKILL)
            await until(lambda: not guest.alive())
            assert "QEMU" in str(guest.facts()["note"])
            for ask in (guest.pause, guest.tracker.harvest):
                with pytest.raises(CkptdError):
                    done = ask()
                    if done is not None and asyncio.iscoroutine(done):
                        await done

        with_guest(vm, work)


def test_a_killed_keeper_leaves_a_silent_guest_and_the_next_one_cleans_up(vm: Counting) -> None:
    before = footprint(vm)

    async def run() -> None:
        for moment in ("running", "paused"):
            guest = made(vm)
            await guest.attach()
            image = await first(guest)
            await guest.resume()
            await epoch(guest, image)
            if moment == "paused":
                await guest.pause()
            kill_guest(vm.runtime)
            assert not guest.alive()
            with pytest.raises(CkptdError):
                await guest.pause() if moment == "running" else await guest.save_state()
            await guest.detach()
            if moment == "running":
                vm.goes_on()
            else:
                assert vm.stands()
            await asyncio.sleep(0.1)
            heard = len(vm.receiver.numbers)
            await asyncio.sleep(0.2)
            assert len(vm.receiver.numbers) == heard
        guest = made(vm)
        await guest.attach()
        try:
            image = await first(guest)
            await guest.resume()
            vm.goes_on()
            await epoch(guest, image)
            assert len(vm.operator.ask("query-fdsets")) == 1
        finally:
            await guest.detach()

    asyncio.run(run())
    nothing_is_left(vm, before)
    heard = len(vm.receiver.numbers)
    eventually(lambda: len(vm.receiver.numbers) > heard)
    numbers = vm.receiver.numbers
    assert numbers == sorted(set(numbers))


# --- refusals


def test_disks_and_video_ram_are_refused_by_name_unless_the_operator_says_otherwise(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    drive = ["-drive", f"if=none,id=d,format=raw,file={disk}", "-device", "virtio-blk-pci,drive=d"]
    with counting(*drive, "-device", "VGA", share=False) as vm:
        before = footprint(vm)

        async def refused(said: str, **options: Any) -> None:
            with pytest.raises(GuestError, match=said):
                await made(vm, **options).attach()

        asyncio.run(refused("The disk d .* is writable"))
        asyncio.run(refused("The RAM block .*vga.vram .* is video RAM", disks="shared"))
        nothing_is_left(vm, before)

        async def work(guest: QemuGuest) -> None:
            assert guest.tracker.needs_pause  # a disk may read while it is harvested
            image = await first(guest)
            await guest.resume()
            await epoch(guest, image)

        for disks in ("shared", "ignore"):
            with_guest(vm, work, disks=disks, ignore=("vga.vram",))
        nothing_is_left(vm, before)


def test_one_daemon_and_one_monitors_client_at_a_time(vm: Counting) -> None:
    async def work(guest: QemuGuest) -> None:
        with pytest.raises(GuestError, match="another daemon is attached"):
            await made(vm).attach()
        with pytest.raises(StateError, match="not paused"):
            await guest.resume()
        with pytest.raises(StateError, match="while the guest is paused"):
            await guest.save_state()
        other = QemuGuest("other", QemuSpec(vm.qmp), vm.place / "other")
        with pytest.raises(GuestError, match="another client holds it"):
            await other.attach()
        await first(guest)
        with pytest.raises(StateError, match="paused already"):
            await guest.pause()
        await guest.resume()

    with_guest(vm, work)
    with pytest.raises(StateError, match="not attached"):
        made(vm).geometry  # noqa: B018


def test_ended_means_that_qemu_quits() -> None:
    with counting() as vm:

        async def run() -> None:
            guest = made(vm)
            await guest.attach()
            await guest.end()
            assert not guest.alive()

        asyncio.run(run())
        vm.operator.process.wait(60)
