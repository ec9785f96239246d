"""Saving where QEMU has no xen-save-devices-state: the same guest comes out of it, and QEMU is as it was."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptd.demo.children import kill_guest
from ckptd.errors import CkptdError, GuestError
from ckptd.guests.qemu.cmdline import Overrides, standby_command
from ckptd.guests.qemu.guest import QemuGuest
from ckptd.guests.qemu.qmp import Monitor
from ckptd.guests.qemu.saving import BY_COMMAND, BY_MIGRATION, ByMigration, way_of
from ckptd.guests.qemu.spec import QemuSpec
from ckptd.guests.qemu.standby import QemuStandby
from ckptd.guests.qemu.state import decode, describe, encode
from ckptd.guests.qemu.survey import Backend, Block
from ckptd.memory.dirtyset import DirtySet
from ckptd.units import PAGE_SIZE

from .counting import Counting, counting, eventually
from .lacking import LackingGuest
from .machines import needs_qemu
from .test_refusals import FINE

Image = list[np.ndarray]  # type: ignore[type-arg]


# --- the choice


@pytest.mark.parametrize(
    ("commands", "capabilities", "way"),
    [
        (("migrate", "xen-save-devices-state"), (), BY_COMMAND),
        (("migrate", "xen-save-devices-state"), ("events", "x-ignore-shared"), BY_COMMAND),
        (("migrate",), ("events", "x-ignore-shared"), BY_MIGRATION),
        (("migrate",), ("events",), None),
        (("migrate",), ("x-ignore-shared",), None),
        ((), ("events", "x-ignore-shared"), None),
    ],
)
def test_it_is_chosen_by_what_qemu_has(
    commands: tuple[str, ...], capabilities: tuple[str, ...], way: str | None
) -> None:
    for version in ("2.0.0", "7.2.22", "99.0.0"):
        found = replace(FINE, version=version, commands=commands, capabilities=capabilities)
        if way is not None:
            assert way_of(found) == way
        else:
            with pytest.raises(GuestError, match="can save no device state without RAM"):
                way_of(found)


def test_a_state_says_how_it_was_saved_and_an_unknown_way_is_named() -> None:
    for way in (BY_COMMAND, BY_MIGRATION):
        assert decode(encode(describe(FINE, way), b"devices")).way == way
    with pytest.raises(GuestError, match="in a way that this ckptd does not know: 'by carrier pigeon'"):
        decode(encode(describe(FINE, "by carrier pigeon"), b"devices"))
    with pytest.raises(GuestError, match="cannot be read"):
        decode(encode(b"\x93\x01\x02\x03", b"devices"))


def test_the_standby_expects_a_configuration_section_only_from_a_migration() -> None:
    word = "migration.send-configuration=off"
    options = {"ram_files": {one.id: "/r" for one in FINE.ram}, "monitor": "/m"}
    assert word in standby_command(FINE, **options)  # type: ignore[arg-type]
    assert word not in standby_command(FINE, **options, configuration=True)  # type: ignore[arg-type]


# --- with QEMU


async def until(condition: Callable[[], object]) -> None:
    await asyncio.to_thread(eventually, condition)


def made(vm: Counting, disks: str = "refuse") -> QemuGuest:
    return LackingGuest("vm", QemuSpec(vm.qmp, disks), vm.runtime)


def with_guest(vm: Counting, work: Callable[[QemuGuest], Coroutine[Any, Any, None]], disks: str = "refuse") -> None:
    async def run() -> None:
        guest = made(vm, disks)
        await guest.attach()
        try:
            assert guest.facts()["saves_by"] == BY_MIGRATION
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
    """Everything, and the guest goes on."""
    await guest.pause()
    guest.tracker.start()
    image = [np.zeros((region.pages, PAGE_SIZE), dtype=np.uint8) for region in guest.geometry]
    copied(guest, DirtySet.everything(guest.geometry), image)
    await guest.save_state()
    await guest.resume()
    return image


async def saved(guest: QemuGuest, image: Image) -> bytes:
    """An epoch up to its state; the guest stays paused. The image is compared with memory, whole."""
    await guest.pause()
    dirty = guest.tracker.harvest()
    assert not dirty.overflowed
    copied(guest, dirty, image)
    state = await guest.save_state()
    if (late := guest.late()) is not None:
        copied(guest, late, image)
    assert all(np.array_equal(mine, live[0 : len(mine)]) for mine, live in zip(image, guest.memory, strict=True))
    return state


async def epoch(guest: QemuGuest, image: Image) -> bytes:
    state = await saved(guest, image)
    mark = guest.gate.mark()
    await guest.resume()
    guest.gate.release(mark)
    return state


def settings(vm: Counting) -> dict[str, object]:
    """All that a migration depends on, and what is there besides."""
    ask = vm.operator.ask
    return {
        "capabilities": ask("query-migrate-capabilities"),
        "parameters": ask("query-migrate-parameters"),
        "fdsets": ask("query-fdsets"),
        "objects": sorted(one["name"] for one in ask("qom-list", {"path": "/objects"})),
        "descriptors": len(list(Path(f"/proc/{vm.pid}/fd").iterdir())),
        "status": vm.status(),
    }


def is_as_before(vm: Counting, before: dict[str, object]) -> None:
    eventually(lambda: settings(vm)["descriptors"] == before["descriptors"])
    assert settings(vm) == before


@contextmanager
def replica(image: Sequence[bytes]) -> Iterator[tuple[list[int], Path]]:
    """Files of the image, one for each region, and a folder for the standby."""
    place, runtime = Path(tempfile.mkdtemp(prefix="ckr", dir="/dev/shm")), Path(tempfile.mkdtemp(prefix="ckq"))
    fds = []
    for number, region in enumerate(image):
        (place / f"image-{number}").write_bytes(region)
        fds.append(os.open(place / f"image-{number}", os.O_RDWR))
    try:
        yield fds, runtime
    finally:
        for fd in fds:
            os.close(fd)
        shutil.rmtree(place)
        shutil.rmtree(runtime)


def words(standby: QemuStandby) -> list[int]:
    assert standby._qemu is not None
    return [int(word, 16) for word in standby._qemu.monitor.human("xp /4xw 0x100000").partition(": ")[2].split()]


def accelerators() -> list[Any]:
    usable = os.access("/dev/kvm", os.R_OK | os.W_OK)
    return ["tcg", pytest.param("kvm", marks=pytest.mark.skipif(not usable, reason="there is no /dev/kvm to use"))]


@pytest.mark.qemu
@needs_qemu
@pytest.mark.parametrize("accel", accelerators())
def test_twenty_epochs_and_the_promoted_guest_is_the_same(accel: str) -> None:
    with counting(cards=1, every=5, accel=accel) as vm:
        before = settings(vm)
        found: dict[str, Any] = {}

        async def work(guest: QemuGuest) -> None:
            image = await first(guest)
            for _ in range(20):
                await asyncio.sleep(0.01)
                assert decode(await epoch(guest, image)).way == BY_MIGRATION
                assert vm.status() == "running"
            on = {one["capability"] for one in vm.operator.ask("query-migrate-capabilities") if one["state"]}
            assert "x-ignore-shared" not in on, "a migration of the operator's would lose the RAM"
            await until(lambda: len(vm.receiver.numbers) > 10)
            vm.goes_on()
            found["state"] = await saved(guest, image)
            found["image"], found["geometry"] = [region.tobytes() for region in image], guest.geometry
            found["words"] = vm.words()
            await guest.resume()

        with_guest(vm, work)
        vm.goes_on()
        is_as_before(vm, before)
        os.kill(vm.pid, signal.SIGKILL)

        @asynccontextmanager
        async def still() -> AsyncIterator[bytes]:
            yield found["state"]

        async def promoted(images: Sequence[int], runtime: Path) -> None:
            standby = QemuStandby("vm", runtime, Overrides())
            try:
                assert await standby.fit(found["geometry"], images, found["state"], still) == ""
                assert os.pread(images[0], len(found["image"][0]), 0) == found["image"][0], "the image was written"
                await standby.activate(found["geometry"], images, found["state"], b"", 0)
                counter, _, packets, _ = found["words"]
                await until(lambda: words(standby)[0] > counter + 100)
                assert words(standby)[1] == 0, "memory and registers are not of one moment"
                last = vm.receiver.connections[-1]
                await until(lambda: len(last) > 20)
                assert last[0] in (packets, packets + 1) and last[:20] == list(range(last[0], last[0] + 20))
                assert standby._qemu is not None
                standby._qemu.monitor.execute("system_reset")  # the firmware has come along
                await until(lambda: 0 < words(standby)[0] < counter)
            finally:
                await standby.end()

        with replica(found["image"]) as (images, runtime):
            asyncio.run(promoted(images, runtime))


@pytest.mark.qemu
@needs_qemu
@pytest.mark.parametrize("memory", ["16M", "1G"])
def test_ram_that_would_travel_whole_is_refused_with_the_cure(memory: str) -> None:
    with counting(share=False, memory=memory) as vm:
        before = settings(vm)
        with pytest.raises(GuestError, match=r"would send RAM whole .*pc\.ram") as refused:
            asyncio.run(made(vm).attach())
        assert "memory-backend-file" in str(refused.value) and "share=on" in str(refused.value)
        vm.goes_on()
        is_as_before(vm, before)


@pytest.mark.qemu
@needs_qemu
def test_what_the_operator_has_stopped_stays_so_and_its_disks_are_active(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    drive = ["-drive", f"if=none,id=d,format=raw,file={disk}", "-device", "virtio-blk-pci,drive=d"]
    with counting(*drive) as vm:

        async def work(guest: QemuGuest) -> None:
            image = await first(guest)
            vm.operator.ask("stop")
            await until(lambda: "someone else has paused the guest" in str(guest.facts()["note"]))
            states = [await epoch(guest, image) for _ in range(3)]
            assert states[0] == states[1] == states[2] and vm.stands()
            await asyncio.sleep(0.6)
            assert "someone else has paused the guest" in str(guest.facts()["note"])
            vm.operator.ask("cont")
            vm.goes_on()
            await epoch(guest, image)
            await epoch(guest, image)
            vm.goes_on()
            vm.operator.ask("stop")
            await epoch(guest, image)
            assert vm.stands()

        before = settings(vm)
        with_guest(vm, work, disks="ignore")
        assert vm.stands()
        is_as_before(vm, before | {"status": "paused"})
        vm.operator.ask("block_resize", {"device": "d", "size": 2 << 20})  # refused for an inactive one
        vm.operator.ask("cont")
        vm.goes_on()


@pytest.mark.qemu
@needs_qemu
def test_an_epoch_in_which_somebody_let_the_guest_go_on_is_void() -> None:
    with counting() as vm:

        async def work(guest: QemuGuest) -> None:
            image = await first(guest)
            for stopped in (False, True, True):
                if stopped:
                    vm.operator.ask("stop")
                await guest.pause()
                await until(lambda: vm.status() == "postmigrate")
                vm.operator.ask("cont")
                vm.goes_on()
                with pytest.raises(GuestError, match="this epoch is void"):
                    await guest.save_state()
                await guest.resume()
                vm.goes_on()
            await epoch(guest, await first(guest))
            await guest.pause()
            await until(lambda: vm.status() == "postmigrate")
            vm.operator.ask("system_reset")
            await until(lambda: any(event["event"] == "RESET" for event in vm.operator.events) or vm.status() == "")
            with pytest.raises(GuestError, match="this epoch is void"):
                await guest.save_state()
            await guest.resume()
            vm.goes_on()
            image = await first(guest)
            await epoch(guest, image)
            vm.goes_on()

        before = settings(vm)
        with_guest(vm, work)
        is_as_before(vm, before)


@pytest.mark.qemu
@needs_qemu
def test_a_guest_that_has_shut_down_is_not_made_to_look_as_if_it_had_not() -> None:
    with counting("-no-shutdown") as vm:

        async def work(guest: QemuGuest) -> None:
            await first(guest)
            for line in ("o /4 0xcf8 0x80000b40", "o /4 0xcfc 0x601", "o /4 0xcf8 0x80000b80", "o /1 0xcfc 1"):
                vm.operator.ask("human-monitor-command", {"command-line": line})  # where the PM is: 0x600
            vm.operator.ask("human-monitor-command", {"command-line": "o /w 0x604 0x2000"})  # ACPI: power off
            await until(lambda: vm.status() == "shutdown")
            with pytest.raises(GuestError, match="the guest has shut down: it cannot be saved"):
                await guest.pause()
            assert vm.status() == "shutdown"

        with_guest(vm, work)
        assert vm.status() == "shutdown"


@pytest.mark.qemu
@needs_qemu
def test_a_killed_keeper_is_followed_by_one_that_puts_everything_back() -> None:
    with counting(cards=1, every=5) as vm:
        vm.operator.ask("migrate-set-parameters", {"max-bandwidth": 12_345_678})
        xbzrle = [{"capability": "xbzrle", "state": True}]
        vm.operator.ask("migrate-set-capabilities", {"capabilities": xbzrle})
        before = settings(vm)

        async def run() -> None:
            for moment in ("running", "saving", "saved", "stopped by the operator"):
                guest = made(vm)
                await guest.attach()
                await first(guest)
                if moment == "stopped by the operator":
                    vm.operator.ask("stop")
                if moment != "running":
                    await guest.pause()
                if moment in ("saved", "stopped by the operator"):
                    await guest.save_state()
                kill_guest(vm.runtime)
                with pytest.raises(CkptdError):
                    await guest.save_state() if moment == "saving" else await guest.pause()
                await guest.detach()
                if moment == "running":
                    vm.goes_on()
                else:
                    await until(vm.stands)
            guest = made(vm)
            task = asyncio.create_task(guest.attach())
            await until(lambda: "someone else has paused" in str(guest.facts().get("waits_for")))
            assert vm.stands()
            vm.operator.ask("cont")
            await task
            await epoch(guest, await first(guest))
            vm.goes_on()
            await guest.detach()

        asyncio.run(run())
        vm.goes_on()
        is_as_before(vm, before)


@pytest.mark.qemu
@needs_qemu
def test_a_migration_of_somebody_elses_voids_the_epoch_and_is_left_alone() -> None:
    with counting() as vm:

        async def work(guest: QemuGuest) -> None:
            image = await first(guest)
            reader, writer = os.pipe()
            vm.operator.ask("getfd", {"fdname": "away"}, writer)
            os.close(writer)
            vm.operator.ask("migrate", {"uri": "fd:away"})  # nobody reads it
            await until(lambda: vm.operator.ask("query-migrate").get("status") == "active")
            with pytest.raises(GuestError, match="QEMU refuses migrate"):
                await saved(guest, image)
            assert vm.operator.ask("query-migrate")["status"] == "active"
            vm.operator.ask("migrate_cancel")
            os.close(reader)
            await until(lambda: vm.operator.ask("query-migrate")["status"] in ("cancelled", "failed"))
            await guest.resume()
            vm.goes_on()
            await epoch(guest, await first(guest))

        before = settings(vm)
        with_guest(vm, work)
        vm.goes_on()
        is_as_before(vm, before)


@pytest.mark.qemu
@needs_qemu
def test_a_stream_that_grows_beyond_all_devices_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where QEMU's own count of RAM does not tell."""
    monkeypatch.setattr(ByMigration, "_check", lambda self, total: None)
    monkeypatch.setattr("ckptd.guests.qemu.saving._MOST", 1 << 16)
    with counting(share=False) as vm:
        monitor = Monitor(vm.qmp)
        file = os.memfd_create("state")
        ram = Backend("pc.ram", "memory-backend-ram", 16 << 20, False, True, "pc.ram", PAGE_SIZE, 0)
        found = replace(FINE, ram=(ram,), blocks=(Block("pc.bios", 1 << 16, "rom"),))
        saver = ByMigration(found, monitor, file, np.zeros(4032, dtype=np.uint8))
        monitor.execute("stop")
        saver.begin()
        with pytest.raises(GuestError, match="would send RAM whole"):
            saver.finish()
        monitor.execute("cont")
        saver.leave()
        saver.close()
        monitor.close()
        os.close(file)
        vm.goes_on()
