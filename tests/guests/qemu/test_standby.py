"""The side that takes over: rehearsal, the warm QEMU, and the guest that goes on from the moment it was saved at."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ckptd.errors import GuestError, StateError
from ckptd.guests.qemu.cmdline import Overrides
from ckptd.guests.qemu.guest import QemuGuest
from ckptd.guests.qemu.spec import QemuSpec
from ckptd.guests.qemu.standby import QemuStandby
from ckptd.memory.regions import Geometry

from .counting import Counting, counting, eventually
from .machines import needs_qemu

pytestmark = [pytest.mark.qemu, needs_qemu]


@dataclass
class Epoch:
    """What a secondary has of a guest, and what the guest was like then."""

    geometry: Geometry
    state: bytes
    images: list[bytes]
    counter: int
    packets: int
    vm: Counting
    files: list[int] = field(default_factory=list)
    stills: int = 0

    @asynccontextmanager
    async def still(self) -> AsyncIterator[bytes]:
        self.stills += 1
        path = os.readlink(f"/proc/self/fd/{self.files[0]}")
        found = [line.split()[1] for line in _mappings_of_qemus() if line.endswith(path)]
        assert found and all(rights.endswith("p") for rights in found), "a rehearsal could write to the replica"
        yield self.state

    @property
    def digest(self) -> str:
        return hashlib.sha256(b"".join(os.pread(fd, os.fstat(fd).st_size, 0) for fd in self.files)).hexdigest()


def _mappings_of_qemus() -> Iterator[str]:
    for one in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if b"qemu-system" in (one / "cmdline").read_bytes():
                yield from (one / "maps").read_text().splitlines()


@contextmanager
def saved(**options: Any) -> Iterator[Epoch]:
    """A guest at the end of an epoch, its QEMU dead."""
    with counting(cards=1, every=5, **options) as vm:
        vm.goes_on()

        async def save() -> Epoch:
            guest = QemuGuest("vm", QemuSpec(vm.qmp), vm.runtime)
            await guest.attach()
            await guest.pause()
            guest.tracker.start()
            state = await guest.save_state()
            images = [
                guest.memory[index][0 : region.pages].tobytes() for index, region in enumerate(guest.geometry)
            ]
            counter, faults, packets, _ = vm.words()
            assert not faults
            found = Epoch(guest.geometry, state, images, counter, packets, vm)
            os.kill(vm.pid, signal.SIGKILL)
            await guest.detach()
            return found

        yield asyncio.run(save())


@pytest.fixture(scope="module")
def of_all() -> Iterator[Epoch]:
    with saved() as epoch:
        yield epoch


@pytest.fixture
def epoch(of_all: Epoch) -> Iterator[Epoch]:
    with opened(of_all):
        yield of_all


@contextmanager
def opened(epoch: Epoch) -> Iterator[None]:
    """With a replica of its own."""
    place = Path(tempfile.mkdtemp(prefix="ckr", dir="/dev/shm"))
    try:
        epoch.files, epoch.stills = [], 0
        for number, image in enumerate(epoch.images, 1):
            path = place / f"image,{number}"
            path.write_bytes(image)
            epoch.files.append(os.open(path, os.O_RDWR))
        yield
    finally:
        for fd in epoch.files:
            os.close(fd)
        shutil.rmtree(place)


@pytest.fixture
def runtime() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ckq", dir="/tmp"))
    yield made
    left = running(made)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(made)
    assert not left, "a QEMU was left behind"


def running(runtime: Path) -> list[int]:
    """QEMUs whose monitors are there."""
    found = []
    for one in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            if os.fsencode(runtime) in (one / "cmdline").read_bytes() and b"qemu" in (one / "cmdline").read_bytes():
                found.append(int(one.name))
    return found


async def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "in vain"
        await asyncio.sleep(0.005)


def with_standby(
    runtime: Path, work: Callable[[QemuStandby], Coroutine[Any, Any, None]], overrides: Overrides | None = None
) -> None:
    async def run() -> None:
        standby = QemuStandby("vm", runtime, overrides or Overrides())
        await standby.prepare()
        try:
            await work(standby)
        finally:
            await standby.end()

    asyncio.run(run())


def pid_of(standby: QemuStandby) -> int:
    return int(str(standby.facts()["pid"]))


def words(standby: QemuStandby) -> list[int]:
    assert standby._qemu is not None
    said = standby._qemu.monitor.human("xp /4xw 0x100000")
    return [int(word, 16) for word in said.partition(": ")[2].split()]


async def goes_on(standby: QemuStandby, epoch: Epoch, number: int) -> None:
    """From the very counter and packet that it was saved with."""
    await until(lambda: words(standby)[0] > epoch.counter + 100)
    assert words(standby)[1] == 0, "memory and registers are not of one moment"
    await until(lambda: len(epoch.vm.receiver.connections[number]) > 20)
    connection = epoch.vm.receiver.connections[number]
    begin = connection[0]  # it may have been stopped when it had counted a packet, but not sent it yet
    assert begin in (epoch.packets, epoch.packets + 1) and connection[:20] == list(range(begin, begin + 20))


async def activated(standby: QemuStandby, epoch: Epoch, state: bytes | None = None) -> None:
    await standby.activate(epoch.geometry, epoch.files, epoch.state if state is None else state, b"", 0)


def accelerators() -> list[Any]:
    usable = os.access("/dev/kvm", os.R_OK | os.W_OK)
    return ["tcg", pytest.param("kvm", marks=pytest.mark.skipif(not usable, reason="there is no /dev/kvm to use"))]


@pytest.mark.parametrize("accel", accelerators())
@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_rehearsed_warm_and_promoted_it_is_the_same_guest(accel: str, machine: str, runtime: Path) -> None:
    private = machine == "q35"
    with saved(accel=accel, machine=machine, share=not private) as epoch, opened(epoch):

        async def work(standby: QemuStandby) -> None:
            before = epoch.digest
            assert await standby.fit(epoch.geometry, epoch.files, epoch.state, epoch.still) == ""
            warm = pid_of(standby)
            assert epoch.stills == 1 and standby.alive() and not standby.active and running(runtime) == [warm]
            assert await standby.fit(epoch.geometry, epoch.files, epoch.state, epoch.still) == ""
            assert epoch.stills == 1 and pid_of(standby) == warm, "once is enough"
            end = time.monotonic() + 2
            while time.monotonic() < end:
                await asyncio.sleep(0.2)
                assert epoch.digest == before, "the image was written"
            connections = len(epoch.vm.receiver.connections)
            await activated(standby, epoch)
            assert standby.active and pid_of(standby) == warm
            await goes_on(standby, epoch, connections - 1)
            await until(lambda: epoch.digest != before)  # its memory is the image
            with pytest.raises(StateError, match="runs on this side already"):
                await activated(standby, epoch)
            assert await standby.fit(epoch.geometry, epoch.files, epoch.state, epoch.still) == ""
            assert pid_of(standby) == warm and standby.alive()

        with_standby(runtime, work)
        eventually(lambda: not running(runtime))


def test_a_promoted_guest_can_be_reset(epoch: Epoch, runtime: Path) -> None:
    async def work(standby: QemuStandby) -> None:
        await activated(standby, epoch)
        await goes_on(standby, epoch, -1)
        assert standby._qemu is not None
        standby._qemu.monitor.execute("system_reset")
        for _ in range(100):
            await asyncio.sleep(0.02)
            if 0 < words(standby)[0] < epoch.counter:
                return
        raise AssertionError("it does not start again")

    with_standby(runtime, work)


def test_cold_and_with_a_damaged_state_first(epoch: Epoch, runtime: Path) -> None:
    async def work(standby: QemuStandby) -> None:
        before = epoch.digest
        damaged = bytearray(epoch.state)
        damaged[-100] ^= 1
        with pytest.raises(GuestError, match="damaged: nothing of it was used"):
            await activated(standby, epoch, bytes(damaged))
        assert "damaged" in await standby.fit(epoch.geometry, epoch.files, bytes(damaged), epoch.still)
        other = Geometry.of(ram=100)
        assert "the state is of a guest of ram" in await standby.fit(other, epoch.files, epoch.state, epoch.still)
        assert not running(runtime) and epoch.digest == before and not standby.active
        await activated(standby, epoch)
        await goes_on(standby, epoch, -1)

    with_standby(runtime, work)


def test_one_that_fails_to_load_says_why_and_the_next_try_can_work(epoch: Epoch, runtime: Path) -> None:
    from ckptd.guests.qemu.state import decode, describe, encode

    found = decode(epoch.state)
    wrong = encode(describe(found.survey), found.devices[:3000] + bytes(2000))

    async def work(standby: QemuStandby) -> None:
        before = epoch.digest
        assert await standby.fit(epoch.geometry, epoch.files, epoch.state, epoch.still) == ""
        with pytest.raises(GuestError, match=r"QEMU.*: .*qemu-system"):
            await activated(standby, epoch, wrong)
        assert not standby.active and epoch.digest == before
        await activated(standby, epoch)
        await goes_on(standby, epoch, -1)

    with_standby(runtime, work)


def test_a_warm_one_that_dies_is_replaced(epoch: Epoch, runtime: Path) -> None:
    async def work(standby: QemuStandby) -> None:
        assert await standby.fit(epoch.geometry, epoch.files, epoch.state, epoch.still) == ""
        for count in (1, 2):
            old = pid_of(standby)
            os.kill(old, signal.SIGKILL)
            await until(lambda: standby.alive() and pid_of(standby) not in (0, old))  # noqa: B023
            assert standby.facts()["replaced"] == count
        await activated(standby, epoch)
        await goes_on(standby, epoch, -1)

    with_standby(runtime, work)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (Overrides(binary="/nowhere/qemu"), "cannot be started"),
        (Overrides(append=("-machine", "pc-unheard-of")), "unsupported machine type"),
        (Overrides(append=("-netdev", "tap,id=t,ifname=nowhere0,script=no,downscript=no")), "no tap device nowhere0"),
        (Overrides(append=("-drive", "if=none,id=d,file=/nowhere/disk")), "/nowhere/disk"),
        (Overrides(replace={"ne2k_isa,": "rtl8139,", ",iobase=0x300,irq=9": ""}), "QEMU"),
        (
            Overrides(command=("qemu-system-x86_64", "-qmp", "unix:{monitor},server=on,wait=off", "-S", "-mem-path",
                               "{ram:ram}")),
            "a rehearsal would write to the replica",
        ),
    ],
)  # fmt: skip
def test_a_host_that_could_not_go_on_with_it_says_so_early(
    overrides: Overrides, said: str, epoch: Epoch, runtime: Path
) -> None:
    async def work(standby: QemuStandby) -> None:
        before = epoch.digest
        why = await standby.fit(epoch.geometry, epoch.files, epoch.state, epoch.still)
        assert why and re.search(said, why), why
        assert not standby.alive() and not running(runtime) and epoch.digest == before

    with_standby(runtime, work, overrides)


def test_promoted_while_it_rehearses(epoch: Epoch, runtime: Path) -> None:
    async def work(standby: QemuStandby) -> None:
        fitting = asyncio.create_task(standby.fit(epoch.geometry, epoch.files, epoch.state, epoch.still))
        await until((runtime / "rehearsal.log").exists)
        await activated(standby, epoch)
        assert await fitting == "" and standby.active
        await goes_on(standby, epoch, -1)
        assert running(runtime) == [pid_of(standby)]

    with_standby(runtime, work)


def test_ended_while_it_starts_leaves_no_process(epoch: Epoch, runtime: Path) -> None:
    async def work(standby: QemuStandby) -> None:
        fitting = asyncio.create_task(standby.fit(epoch.geometry, epoch.files, epoch.state, epoch.still))
        await until((runtime / "rehearsal.log").exists)
        fitting.cancel()
        with suppress(asyncio.CancelledError):
            await fitting
        assert not running(runtime)
        assert await standby.fit(epoch.geometry, epoch.files, epoch.state, epoch.still) == ""
        os.kill(pid_of(standby), signal.SIGKILL)
        await until(lambda: standby._replacing is not None and running(runtime))

    with_standby(runtime, work)
    assert not running(runtime)


def test_a_daemon_that_dies_leaves_the_guest_running_and_the_next_one_finds_it(epoch: Epoch, runtime: Path) -> None:
    async def run() -> None:
        first = QemuStandby("vm", runtime, Overrides())
        assert await first.fit(epoch.geometry, epoch.files, epoch.state, epoch.still) == ""
        warm = pid_of(first)
        assert first._qemu is not None
        first._unwatch()
        first._qemu.monitor.close()  # its daemon is killed
        second = QemuStandby("vm", runtime, Overrides())
        await second.prepare()
        assert not second.active and not second.alive()
        await until(lambda: warm not in running(runtime))
        await activated(second, epoch)
        pid = pid_of(second)
        await second.detach()
        assert running(runtime) == [pid]
        third = QemuStandby("vm", runtime, Overrides())
        await third.prepare()
        assert third.active and third.alive() and pid_of(third) == pid
        blocked = QemuStandby("vm", runtime, Overrides())
        with pytest.raises(GuestError, match="another client holds it"):
            await blocked.prepare()
        with pytest.raises(StateError, match="runs on this side already"):
            await activated(third, epoch)
        assert await third.fit(epoch.geometry, epoch.files, epoch.state, epoch.still) == ""
        await goes_on(third, epoch, -1)
        await third.end()

    try:
        asyncio.run(run())
    finally:
        eventually(lambda: not running(runtime))


def test_without_a_pid_file_or_with_a_strangers_nothing_is_ended(runtime: Path) -> None:
    with subprocess.Popen(["sleep", "600"]) as stranger:
        try:
            for text in ("", "x", "0", str(2**22 + 1), str(stranger.pid)):
                (runtime / "guest.pid").write_text(text)
                with_standby(runtime, lambda standby: asyncio.sleep(0))
                assert stranger.poll() is None
        finally:
            stranger.kill()
