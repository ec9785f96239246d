"""Serial output, held: with real QEMUs whose guest says numbered lines, so that every byte is accounted for."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.demo.children import kill_guest
from ckptd.errors import GuestError
from ckptd.guests.qemu.chardevs import Chardevs, refused
from ckptd.guests.qemu.cmdline import Overrides
from ckptd.guests.qemu.gate import GATE_BYTES, Holder, QemuGate
from ckptd.guests.qemu.guest import QemuGuest
from ckptd.guests.qemu.qmp import Monitor
from ckptd.guests.qemu.said import decode_said, encode_said, records, write_records
from ckptd.guests.qemu.spec import QemuSpec
from ckptd.guests.qemu.standby import QemuStandby
from ckptd.guests.qemu.vm import Vm
from ckptd.memory.regions import Geometry

from .machines import needs_qemu
from .speaking import Speaking, follows, speaking

NULL = ("-chardev", "null,id=con", "-serial", "chardev:con")


async def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "in vain"
        await asyncio.sleep(0.005)


# --- pure: the encoding


def test_a_blob_has_what_was_said_by_label() -> None:
    said = {"serial0": b"one\ntwo\xff", "virtiocon0": bytes(1000), "idle": b""}
    assert decode_said(encode_said(said)) == {label: data for label, data in said.items() if data}
    assert encode_said({}) == encode_said({"idle": b""}) == b"" and decode_said(b"") == {}


def test_every_byte_of_a_blob_counts() -> None:
    blob = encode_said({"serial0": b"what it said", "b": b"x"})
    for at in range(len(blob)):
        for bits in (1, 0x80, 0xFF):
            damaged = bytearray(blob)
            damaged[at] ^= bits
            with pytest.raises(GuestError):
                decode_said(bytes(damaged))
    for end in range(1, len(blob)):
        with pytest.raises(GuestError):
            decode_said(blob[:end])
    with pytest.raises(GuestError):
        decode_said(blob + b"\0")


def test_a_blob_of_another_version_is_named() -> None:
    blob = bytearray(encode_said({"serial0": b"x"}))
    blob[8] = 2
    with pytest.raises(GuestError, match=r"of version 2, and this ckptd knows 1.*one version on both hosts"):
        decode_said(bytes(blob))


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 63), st.binary(max_size=50))))
def test_records_come_back_as_they_were(found: list[tuple[int, int, bytes]]) -> None:
    assert list(records(write_records(found))) == found


# --- pure: what is refused


@pytest.mark.parametrize(
    ("label", "filename", "says"),
    [
        ("serial1", "null", "has no chardev serial1: it has compat_monitor0, mon, serial0"),
        ("compat_monitor0", "unix:/q,server=on", "is a monitor's"),
        ("mon", "null", "is a monitor's"),
        ("ckptd-out-0", "unix:", "is ckptd's own"),
        ("serial0", "mux", "is a mux"),
        ("serial0", "spicevmc", "is spicevmc, which talks with the host's side"),
        ("serial0", "unix:/s,server=on", "A client is connected to the chardev serial0"),
        ("serial0", "tcp:127.0.0.1:1 <-> 127.0.0.1:2", "A client is connected"),
    ],
)
def test_what_would_do_harm_is_refused_by_name(label: str, filename: str, says: str) -> None:
    there = {"serial0": "null", "compat_monitor0": "unix:/q", "mon": "null"}
    if label != "serial1":
        there[label] = filename
    assert says in refused(label, there, ["mon"])


@pytest.mark.parametrize(
    "filename", ["null", "file", "pty:/dev/pts/3", "stdio", "disconnected:unix:/s,server=on", "disconnected:fd:x"]
)
def test_what_nobody_listens_to_now_is_taken(filename: str) -> None:
    assert refused("serial0", {"serial0": filename}, ["mon"]) == ""


# --- the holder, with a socketpair in QEMU's place


class Stage:
    def __init__(self, path: Path, capacity: int = 1 << 20) -> None:
        self.path, self.notices = path, 0
        head = np.zeros(GATE_BYTES, dtype=np.uint8)
        self.holder = Holder(head, capacity, self._noticed)
        self.gate = QemuGate(head, self.holder.wake, ["first", "con"])
        self.ends = []
        for label in ("first", "con"):
            ours, theirs = socket.socketpair()
            self.holder.add_stream(label, theirs, path / label)
            self.ends.append(ours)

    def _noticed(self) -> None:
        self.notices += 1

    def mark(self) -> int:
        mark = self.holder.mark()
        self.gate.hear(write_records(self.holder.said(self.gate.heard, mark)))
        return mark

    def file(self, label: str = "con") -> bytes:
        path = self.path / label
        return path.read_bytes() if path.exists() else b""

    def close(self) -> None:
        self.holder.close()
        for sock in self.ends:
            sock.close()


def eventually(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.001)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    one = Stage(tmp_path)
    yield one
    one.close()


def test_a_stream_is_held_released_to_its_mark_and_part_of_the_checkpoint(stage: Stage) -> None:
    stage.ends[1].sendall(b"early ")
    eventually(lambda: stage.file() == b"early ")
    stage.holder.hold()
    stage.ends[1].sendall(b"one ")
    first = stage.mark()
    stage.ends[1].sendall(b"two ")
    stage.ends[0].sendall(b"other")
    second = stage.mark()
    stage.ends[1].sendall(b"three ")
    time.sleep(0.05)
    assert stage.file() == b"early " and stage.file("first") == b""
    assert decode_said(stage.gate.held(first)) == {"con": b"one "}
    assert decode_said(stage.gate.held(second)) == {"con": b"one two ", "first": b"other"}
    stage.gate.release(first)
    eventually(lambda: stage.file() == b"early one ")
    eventually(lambda: decode_said(stage.gate.held(second)) == {"con": b"two ", "first": b"other"})
    stage.gate.release(second)
    eventually(lambda: stage.file() == b"early one two " and stage.file("first") == b"other")
    eventually(lambda: stage.gate.held(second) == b"")
    third = stage.mark()
    assert decode_said(stage.gate.held(third)) == {"con": b"three "}
    stage.holder.open()
    eventually(stage.holder.drained)
    assert stage.file() == b"early one two three " and stage.gate.held_bytes == 0


def test_a_daemon_that_comes_anew_is_told_everything_that_is_held(stage: Stage) -> None:
    stage.holder.hold()
    for word in (b"a", b"b", b"c"):
        stage.ends[1].sendall(word)
        mark = stage.mark()
    again = QemuGate(stage.holder._head.view(np.uint8), stage.holder.wake, ["first", "con"])
    again.hear(write_records(stage.holder.said(again.heard, mark)))
    assert decode_said(again.held(mark)) == {"con": b"abc"}


def test_a_file_that_cannot_be_written_keeps_its_output_and_only_that(stage: Stage) -> None:
    (stage.path / "con").mkdir()
    stage.holder.hold()
    stage.ends[1].sendall(b"kept ")
    stage.ends[0].sendall(b"other")
    mark = stage.mark()
    stage.gate.release(mark)
    eventually(stage.holder.unwritten)
    assert "Is a directory" in stage.holder.unwritten()
    eventually(lambda: stage.file("first") == b"other")
    stage.ends[1].sendall(b"later")
    mark = stage.mark()
    assert decode_said(stage.gate.held(mark)) == {"con": b"kept later"}  # the next epoch has it, too
    (stage.path / "con").rmdir()
    eventually(lambda: stage.file() == b"kept ")
    assert not stage.holder.unwritten()


def test_what_cannot_be_written_fills_the_gate(tmp_path: Path) -> None:
    stage = Stage(tmp_path, capacity=1000)
    try:
        (tmp_path / "con").mkdir()
        stage.holder.hold()
        stage.ends[1].sendall(bytes(1001))
        stage.gate.release(stage.mark())
        eventually(lambda: stage.gate.full and stage.holder.unwritten())
        assert stage.notices == 1 and stage.gate.held_bytes == 1001
        (tmp_path / "con").rmdir()
        eventually(lambda: not stage.gate.full)
        assert stage.notices == 2 and stage.file() == bytes(1001)
    finally:
        stage.close()


def test_chardevs_fill_the_gate_before_a_checkpoint_cannot_hold_them(tmp_path: Path) -> None:
    stage = Stage(tmp_path, capacity=1 << 30)
    try:
        stage.holder.hold()
        for _ in range(16):
            stage.ends[0].sendall(bytes(1 << 20))
        mark = stage.mark()
        assert not stage.gate.full
        stage.ends[1].sendall(b"x")
        eventually(lambda: stage.gate.full)
        stage.gate.release(mark)
        eventually(lambda: not stage.gate.full)
        assert len(stage.file("first")) == 16 << 20 and not stage.file()
    finally:
        stage.close()


class _Blocked:
    """A QEMU whose guest stands, with a port that has found its socket full: monitor and saver in one.

    Each round of its main loop it says some of what it could not say.
    """

    parks = parked = False

    def __init__(self, stage: Stage, rest: int) -> None:
        self.stage, self.rest, self.events = stage, rest, deque[Any]()
        self.unsaid = -1  # when it was saved

    def poll(self) -> None:
        pass

    def execute(self, command: str) -> dict[str, str]:
        some = min(self.rest, 200)
        self.stage.ends[1].sendall(bytes(some))
        self.rest -= some
        return {"status": "paused"}

    def begin(self) -> None:
        self.unsaid = self.rest


@pytest.mark.parametrize("rest", [0, 1, 199, 1000])
def test_qemu_saves_only_when_its_ports_have_said_everything(stage: Stage, rest: int) -> None:
    qemu = _Blocked(stage, rest)
    vm = Vm.__new__(Vm)
    vm.monitor, vm.holder, vm._saver = cast(Monitor, qemu), stage.holder, qemu  # type: ignore[assignment]
    vm._chardevs = Chardevs(vm.monitor, vm.holder, {"con": stage.path / "con"}, stage.path)
    vm.running = vm.own_stop = vm._saving = False
    vm._stopped = np.zeros(64, dtype=np.uint8)
    stage.holder.hold()
    stage.ends[1].sendall(bytes(500))  # so much that it may have been full
    vm.pause()
    stage.mark()
    assert qemu.unsaid == 0 and stage.gate.held_bytes == 500 + rest


def test_what_came_before_the_change_goes_before_what_qemu_has_written_since(stage: Stage) -> None:
    """A virtio console's backend can be changed only while the guest runs."""
    stage.ends[1].sendall(b"one ")
    eventually(lambda: stage.file() == b"one ")
    stage.holder.hold()
    chardevs = Chardevs(cast(Monitor, None), stage.holder, {}, stage.path)
    chardevs._changed = [(stage.holder.streams[1], stage.path / "con", 4)]
    stage.ends[1].sendall(b"two ")
    with (stage.path / "con").open("ab") as qemus:
        qemus.write(b"three ")
        qemus.flush()
        chardevs.finish()
        qemus.write(b"four")
    assert stage.file() == b"one two three four"
    stage.holder.open()
    assert stage.holder.drained() and stage.file() == b"one two three four"


# --- with QEMU


def made(vm: Speaking, files: dict[str, Path], **options: Any) -> QemuGuest:
    spec = QemuSpec(vm.qmp, chardevs=tuple(files.items()))
    return QemuGuest("vm", spec, vm.runtime, **options)


@asynccontextmanager
async def attached(vm: Speaking, files: dict[str, Path], **options: Any) -> AsyncIterator[QemuGuest]:
    guest = made(vm, files, **options)
    await guest.attach()
    try:
        await guest.pause()
        guest.tracker.start()
        await guest.save_state()
        mark = guest.gate.mark()
        await guest.resume()
        guest.gate.release(mark)
        yield guest
    finally:
        await guest.detach()


async def checkpoint(guest: QemuGuest) -> tuple[bytes, int, bytes]:
    """State, mark, and held."""
    await guest.pause()
    state = await guest.save_state()
    mark = guest.gate.mark()
    held = guest.gate.held(mark)
    await guest.resume()
    return state, mark, held


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


@pytest.mark.qemu
@needs_qemu
def test_nothing_is_in_the_file_before_its_release_and_then_exactly_up_to_the_mark() -> None:
    with speaking(*NULL) as vm:
        file = vm.place / "console"

        async def work() -> None:
            async with attached(vm, {"con": file}) as guest:
                gate, wanted = guest.gate, 0
                for _ in range(5):
                    vm.goes_on()
                    await asyncio.sleep(0.05)
                    _, mark, held = await checkpoint(guest)
                    before = file.read_bytes()
                    vm.goes_on()
                    await asyncio.sleep(0.05)
                    assert file.read_bytes() == before and gate.held_bytes > 0
                    gate.release(mark)
                    wanted = len(before) + len(decode_said(held)["con"])
                    await until(lambda: file.stat().st_size == wanted)  # noqa: B023
                    assert file.read_bytes() == before + decode_said(held)["con"]
                    follows(file.read_bytes())
                assert guest.facts()["chardevs"] == ["con"] and gate.written > gate.released > 4

        run(work())


@pytest.mark.qemu
@needs_qemu
@pytest.mark.parametrize("rest", [20_000, 1])
def test_over_attach_and_detach_no_byte_is_missing_or_twice(rest: int) -> None:
    """From the first line on: QEMU itself has begun the file."""
    with speaking("-serial", "file:console", rest=rest) as vm:
        file = vm.place / "console"

        async def work() -> None:
            for release in (True, False, True):
                async with attached(vm, {"serial0": file}) as guest:
                    assert vm.backend("serial0") == "unix:"
                    for _ in range(4):
                        await asyncio.sleep(0.02)
                        _, mark, _ = await checkpoint(guest)
                        if release:
                            guest.gate.release(mark)
                assert vm.backend("serial0") == "file"
                vm.goes_on()

        run(work())
        vm.operator.ask("stop")
        data = file.read_bytes()
        follows(data, 0)
        assert len(data) // 9 in (vm.line, vm.line - 1)


@pytest.mark.qemu
@needs_qemu
def test_a_full_socket_leaves_nothing_to_be_said_after_the_mark() -> None:
    """QEMU has found no room, and says the rest when there is some, though the guest stands."""
    with speaking(*NULL, "-rtc", "clock=vm", rest=1) as vm:  # or its clock goes on while it stands

        async def work() -> None:
            async with attached(vm, {"con": vm.place / "console"}) as guest:
                keeper = int(str(guest.facts()["pid"]))
                for _ in range(3):
                    os.kill(keeper, signal.SIGSTOP)
                    try:
                        line = -1
                        while line != vm.line:  # it waits for room
                            line = vm.line
                            await asyncio.sleep(0.1)
                        assert vm.status() == "running"
                        vm.operator.ask("stop")
                        pausing = asyncio.create_task(guest.pause())
                        await asyncio.sleep(0.05)
                    finally:
                        os.kill(keeper, signal.SIGCONT)
                    await pausing
                    held = guest.gate.held_bytes
                    state = await guest.save_state()
                    await asyncio.sleep(0.05)
                    assert guest.gate.held_bytes == held
                    guest.gate.release(guest.gate.mark())
                    await guest.resume()
                    await until(lambda: guest.gate.held_bytes == 0)
                    again, _, said = await checkpoint(guest)
                    assert again == state and not said  # no device had anything to do any more
                    vm.operator.ask("cont")
            follows((vm.place / "console").read_bytes())

        run(work())


@pytest.mark.qemu
@needs_qemu
def test_a_pci_serial_port_is_held_too_and_virtio_consoles_are_changed_and_changed_back() -> None:
    consoles = ["-device", "virtio-serial-pci", "-chardev", "null,id=vc", "-device", "virtconsole,chardev=vc"]
    consoles += ["-chardev", "null,id=vp", "-device", "virtserialport,chardev=vp"]
    pci = ["-chardev", "pty,id=p", "-device", "pci-serial,chardev=p,addr=4"]
    with speaking(*pci, *consoles, port=0xC000) as vm:
        for line in ("/4 0xcf8 0x80002010", "/4 0xcfc 0xc001", "/4 0xcf8 0x80002004", "/2 0xcfc 1"):
            vm.operator.ask("human-monitor-command", {"command-line": f"o {line}"})
        files = {label: vm.place / label for label in ("p", "vc", "vp")}

        async def work() -> None:
            async with attached(vm, files) as guest:
                assert [vm.backend(label) for label in files] == ["unix:"] * 3
                for _ in range(3):
                    await asyncio.sleep(0.05)
                    _, mark, held = await checkpoint(guest)
                    follows(decode_said(held)["p"])
                    guest.gate.release(mark)
                await checkpoint(guest)
            assert [vm.backend(label) for label in files] == ["file"] * 3

        run(work())
        vm.goes_on()
        vm.operator.ask("stop")
        follows(files["p"].read_bytes())


@pytest.mark.qemu
@needs_qemu
def test_a_killed_keeper_leaves_a_guest_that_goes_on_silently_and_the_next_one_takes_over() -> None:
    with speaking("-serial", "file:before", rest=2000) as vm:
        file = vm.place / "console"

        async def work() -> None:
            guest = made(vm, {"serial0": file})
            await guest.attach()
            await guest.pause()
            guest.tracker.start()
            await guest.save_state()
            mark = guest.gate.mark()
            await guest.resume()
            guest.gate.release(mark)
            await until(lambda: file.exists() and file.stat().st_size > 100)
            await asyncio.sleep(0.1)
            kill_guest(vm.runtime)
            await guest.detach()
            size = file.stat().st_size
            for _ in range(3):
                before = vm.line
                await until(lambda: vm.line > before + 100)  # noqa: B023
            assert file.stat().st_size == size and vm.status() == "running"
            assert vm.backend("serial0").startswith("disconnected:")
            one = file.read_bytes()
            follows(one)
            async with attached(vm, {"serial0": file}) as guest:
                vm.goes_on()
                _, mark, _ = await checkpoint(guest)
                guest.gate.release(mark)
            two = file.read_bytes()[len(one) :]
            assert follows(two)[0] > follows(one)[1]

        run(work())


@pytest.mark.qemu
@needs_qemu
def test_a_file_that_cannot_be_written_holds_says_so_and_at_the_end_another_one_is_made() -> None:
    with speaking(*NULL) as vm:
        file = vm.place / "console"

        async def work() -> None:
            file.mkdir()
            async with attached(vm, {"con": file}) as guest:
                await until(lambda: "Is a directory" in str(guest.facts()["note"]))
                _, mark, held = await checkpoint(guest)
                begin, end = follows(decode_said(held)["con"])
                guest.gate.release(mark)
                file.rmdir()
                await until(lambda: file.exists() and file.stat().st_size >= end - begin)
                await until(lambda: not guest.facts()["note"])
                assert follows(file.read_bytes(), begin)[1] == end
                file.rename(vm.place / "old")
                file.mkdir()
                _, mark, held = await checkpoint(guest)
                guest.gate.release(mark)
                await until(lambda: "Is a directory" in str(guest.facts()["note"]))
            vm.goes_on()
            spare = vm.runtime / "con.output"
            assert follows(spare.read_bytes(), end)[1] > end + len(decode_said(held)["con"])

        run(work())


@pytest.mark.qemu
@needs_qemu
def test_what_cannot_be_held_is_refused_and_nothing_is_changed() -> None:
    debug = ["-chardev", "null,id=dbg", "-device", "isa-debugcon,chardev=dbg"]
    with speaking("-serial", "unix:s,server=on,wait=off", "-serial", "null", *debug) as vm:

        async def refused(says: str, *labels: str) -> None:
            with pytest.raises(GuestError, match=says):
                await made(vm, {label: vm.place / label for label in labels}).attach()
            assert vm.backend("serial1") == "null"

        client = socket.socket(socket.AF_UNIX)
        client.connect(str(vm.place / "s"))
        run(refused("A client is connected to the chardev serial0", "serial1", "serial0"))
        client.close()
        run(refused("QEMU has no chardev nosuch: it has .*serial0", "nosuch", "serial1"))
        run(refused("chardev compat_monitor0 is a monitor's", "compat_monitor0"))
        run(refused("the chardev dbg cannot be held: .*hotswap", "dbg"))
        vm.goes_on()

        async def taken() -> None:
            async with attached(vm, {"serial0": vm.place / "console"}):
                vm.goes_on()

        run(taken())
        follows((vm.place / "console").read_bytes())


# --- promotion


@pytest.fixture
def runtime() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ckq", dir="/tmp"))
    yield made
    shutil.rmtree(made)


@pytest.mark.qemu
@needs_qemu
@pytest.mark.parametrize(("released", "label"), [(False, "con"), (True, "con"), (False, "other")])
def test_the_standbys_file_goes_on_without_a_gap(released: bool, label: str, runtime: Path) -> None:
    with speaking(*NULL, rest=2000) as vm:
        ours, theirs = vm.place / "console", runtime / "console"
        replica = Path(tempfile.mkdtemp(prefix="ckr", dir="/dev/shm"))
        images = replica / "image-ram", replica / "image-firmware"

        async def work() -> None:
            guest = made(vm, {"con": ours})
            await guest.attach()
            await guest.pause()
            guest.tracker.start()
            await guest.save_state()
            await guest.resume()
            guest.gate.release(guest.gate.mark())
            for _ in range(3):
                await asyncio.sleep(0.02)
                _, mark, _ = await checkpoint(guest)
                guest.gate.release(mark)
            await until(lambda: guest.gate.held(mark) == b"")
            await asyncio.sleep(0.05)
            await guest.pause()
            state = await guest.save_state()
            mark = guest.gate.mark()
            held = guest.gate.held(mark)
            geometry: Geometry = guest.geometry
            for image, rows, region in zip(images, guest.memory, geometry, strict=True):
                image.write_bytes(rows[0 : region.pages].tobytes())
            await guest.resume()
            vm.goes_on()
            if released:
                guest.gate.release(mark)
                await until(lambda: guest.gate.held(mark) == b"")
            os.kill(vm.pid, signal.SIGKILL)
            await guest.detach()
            append = f"file,id=con,path={theirs},append=on"
            standby = QemuStandby("vm", runtime, Overrides(replace={"null,id=con": append}), theirs, {label: theirs})
            fds = [os.open(image, os.O_RDWR) for image in images]
            try:
                await standby.prepare()
                with pytest.raises(GuestError, match="damaged"):
                    await standby.activate(geometry, fds, state, held[:-1] + b"?", 0)
                assert not theirs.exists() or not theirs.read_bytes()
                await standby.activate(geometry, fds, state, held, guest_released)
                wanted = 2 * len(decode_said(held)["con"])
                await until(lambda: theirs.stat().st_size > wanted)
            finally:
                for fd in fds:
                    os.close(fd)
                await standby.end()
            begin, end = follows(ours.read_bytes())
            again = follows(theirs.read_bytes())[0]
            if released:
                assert begin < again == end - len(decode_said(held)["con"])
            else:
                assert again == end

        guest_released = 0
        try:
            run(work())
        finally:
            shutil.rmtree(replica)


def test_a_promotion_that_is_tried_again_says_nothing_twice(tmp_path: Path) -> None:
    standby = QemuStandby("vm", tmp_path, Overrides(), tmp_path / "output", {"con": tmp_path / "con"})
    held = encode_said({"con": b"once", "other": b"elsewhere"})
    standby._release(held)
    standby._release(held)
    assert (tmp_path / "con").read_bytes() == b"once" and (tmp_path / "output").read_bytes() == b"elsewhere"
