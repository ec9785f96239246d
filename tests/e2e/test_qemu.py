"""A Linux in a stock QEMU, real daemons, and clients that outlive either: each test is one story of one boot."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptd.control.client import wish
from ckptd.demo.children import guest_pid
from ckptd.demo.linux import CONTROL_PORT, COUNTER_PORT, SPIN_PORT, build, default_folder
from ckptd.demo.network import Bridge, enter
from ckptd.demo.qemu_pair import CountingClient, QemuPair, QemuSetting
from ckptd.errors import CkptdError
from ckptd.guests.qemu.guest import QemuGuest
from ckptd.guests.qemu.qmp import Monitor
from ckptd.guests.qemu.ram import backends_of
from ckptd.guests.qemu.spec import QemuSpec
from ckptd.guests.qemu.vm import STOPPED_FILE
from ckptd.units import PAGE_SIZE
from tests.e2e.conftest import FAILED
from tests.e2e.pair import wait_for
from tests.e2e.test_demo import left_behind
from tests.guests.qemu.counting import Counting, counting
from tests.guests.qemu.machines import needs_qemu

pytestmark = [pytest.mark.qemu, needs_qemu, pytest.mark.timeout(400)]

PATIENCE = 120.0  # seconds; a busy machine is slow, not wrong


class Scene:
    """A pair, the client that counts with its guest, and what a story looks at. Directories are short and its own."""

    def __init__(self, setting: QemuSetting, cards: int) -> None:
        try:
            linux = build(default_folder())
            network, _ = enter([COUNTER_PORT, CONTROL_PORT, SPIN_PORT], cards, wanted="tap")
        except CkptdError as error:
            pytest.skip(f"{error} ({error.hint})" if error.hint else str(error))
        assert isinstance(network, Bridge)
        self.directory = Path(tempfile.mkdtemp(prefix="ckq-"))
        memory = Path("/dev/shm")
        self.replicas = Path(tempfile.mkdtemp(prefix="ckq-", dir=memory if os.access(memory, os.W_OK) else None))
        self.pair = QemuPair(setting, linux, network, self.directory, self.replicas)
        self.clients: list[CountingClient] = []

    def begin(self) -> CountingClient:
        """Boot, let a client count, attach, and wait until the guest is protected."""
        pair = self.pair
        pair.boot()
        client = self.client()
        wait_for(lambda: len(client.numbers) > 20, "the client counts", PATIENCE)
        pair.attach()
        pair.wait_protected(PATIENCE)
        self.goes_on(client)
        return client

    def client(self, card: int = 0) -> CountingClient:
        one = CountingClient(self.pair.network.address(COUNTER_PORT, there=False, card=card))
        self.clients.append(one)
        one.start()
        return one

    def goes_on(self, client: CountingClient, by: int = 10) -> None:
        """The client is told as many numbers more."""
        before = len(client.numbers)

        def told() -> bool:
            assert not client.error, client.error
            return len(client.numbers) >= before + by

        wait_for(told, f"the client is told more than {before} numbers", PATIENCE)

    def is_consecutive(self, client: CountingClient) -> None:
        """Stop it: on one connection it was told every number once, in order."""
        client.stop()
        assert client.error == ""
        numbers = [number for number, _ in client.numbers]
        assert self.pair.failures(numbers) == []
        assert numbers == list(range(numbers[0], numbers[-1] + 1))

    def restart_primary(self) -> None:
        self.pair.restart_primary()
        self.pair.wait_protected(PATIENCE)

    def memory(self) -> bytes:
        """All of the guest's RAM, looked at from outside."""
        for fd in Path(f"/proc/{self.pair.qemu_pid}/fd").iterdir():
            with suppress(OSError):
                if "memory-backend-memfd" in os.readlink(fd):
                    return fd.read_bytes()
        raise AssertionError("this QEMU has no memory of ours")

    def computes(self) -> None:
        """Many pages change, though nobody hears from it."""

        def changed() -> bool:
            now = np.frombuffer(self.memory(), dtype=np.uint64).reshape(-1, 512)
            return bool((now != before).any(axis=1).sum() > 100)

        before = np.frombuffer(self.memory(), dtype=np.uint64).reshape(-1, 512)
        wait_for(changed, "the guest computes", PATIENCE)

    def nothing_reaches(self, client: CountingClient) -> None:
        """Right after a death: at most the one reply that was on its way, for each reply waits for the next request."""
        before = len(client.numbers)
        self.computes()
        time.sleep(1)
        self.computes()
        assert len(client.numbers) - before <= 1
        assert not client.error

    def check(self, *, there: bool = False) -> int:
        """Every page of `patterns` is what it says; how many rounds there were."""
        word, rounds, pages = self.pair.ask(CONTROL_PORT, "check", there=there, seconds=PATIENCE).split()
        assert (word, int(pages) > 0) == ("ok", True)
        return int(rounds)

    def patterns_go_on(self) -> None:
        before = self.check(there=True)
        time.sleep(1)
        wait_for(lambda: self.check(there=True) > before, "patterns are written", PATIENCE)

    def standby(self) -> dict[str, Any]:
        """What the secondary says of it."""
        found: dict[str, Any] = self.pair.secondary.status()["guests"][0]["standby"]
        return found

    def in_qemu(self) -> dict[str, object]:
        """What somebody who is new sees of this QEMU: objects, character devices, descriptors, and its open files."""
        monitor = Monitor(self.pair.monitor)
        try:
            return {
                "status": monitor.execute("query-status")["status"],
                "objects": sorted(one["name"] for one in monitor.execute("qom-list", {"path": "/objects"})),
                "chardevs": sorted(one["label"] for one in monitor.execute("query-chardev")),
                "fdsets": monitor.execute("query-fdsets"),
                "files": sorted(self._files()),
            }
        finally:
            monitor.close()

    def _files(self) -> Iterator[str]:
        """Names without numbers: a socket's is another one for each connection."""
        for fd in Path(f"/proc/{self.pair.qemu_pid}/fd").iterdir():
            with suppress(OSError):
                yield os.readlink(fd).partition(":[")[0]

    def close(self, failed: bool) -> None:
        for one in self.clients:
            one._end.set()
        self.pair.close()
        if failed:
            for log in sorted(self.directory.rglob("*.log")):
                print(f"--- {log}\n{log.read_text(errors='replace')[-4000:]}")
        traces = [log for log in self.directory.rglob("*.log") if "Traceback" in log.read_text(errors="replace")]
        said = "\n".join(log.read_text(errors="replace")[-4000:] for log in traces)
        self.pair.remove()
        assert left_behind(self.directory) == []
        assert not said, said


Tell = Callable[..., None]


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Iterator[Tell]:
    """Tells a story in a thread of its own, whose network namespace ends with it: pytest's own stays where it is."""
    scenes: list[Scene] = []

    def run(story: Callable[[Scene], None], *, cards: int = 1, **setting: object) -> None:
        raised: list[BaseException] = []

        def work() -> None:
            try:
                scenes.append(Scene(QemuSetting(memory_mib=256, **setting), cards))  # type: ignore[arg-type]
                story(scenes[-1])
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join()
        if raised:
            raise raised[0]

    yield run
    for scene in scenes:
        scene.close(request.node.stash.get(FAILED, False))


# --- the demo, as a user starts it

KEYS = {
    "ok", "failures", "guest", "seed", "seconds", "memory_bytes", "network", "why_not_tap", "boot_seconds", "qemu",
    "epochs_committed", "promoted_epoch", "pause_ms", "commit_ms", "promote_ms", "first_reply_ms", "replies",
    "replies_after", "same_connection", "consecutive", "response_ms", "machine",
}  # fmt: skip


@pytest.mark.parametrize("network", ["tap", "user"])
def test_the_demo_proves_that_no_number_is_lost(network: str, tmp_path: Path) -> None:
    try:
        folder = build(default_folder()).folder
    except CkptdError as error:
        pytest.skip(f"{error} ({error.hint})")
    command = [sys.executable, "-m", "ckptd", "demo", "--guest", "qemu", "--network", network]
    command += ["--seconds", "3", "--memory", "256MiB", "--seed", "7", "--json"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "CKPTD_DEMO_GUEST": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=350)
    if network == "tap" and "there can be no tap devices" in done.stdout + done.stderr:
        pytest.skip(done.stderr or done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report.keys() == KEYS
    assert (report["ok"], report["failures"], report["consecutive"]) == (True, [], True)
    assert report["same_connection"] is (network == "tap")
    assert (report["guest"], report["network"], report["why_not_tap"]) == ("qemu", network, "")
    assert (report["seed"], report["seconds"], report["memory_bytes"]) == (7, 3.0, 256 << 20)
    assert report["replies"] > report["replies_after"] > 0
    assert report["promoted_epoch"] >= report["epochs_committed"] > 5
    assert report["pause_ms"].keys() == report["commit_ms"].keys() == {"p50", "p99", "max"}
    assert min(report[key] for key in ("boot_seconds", "promote_ms", "first_reply_ms", "response_ms")) > 0
    assert list(tmp_path.iterdir()) == []
    assert left_behind(tmp_path) == []


# --- deaths on the primary's host


def test_daemon_and_keeper_die_and_the_next_ones_go_on_with_the_same_guest(tell: Tell) -> None:
    def story(scene: Scene) -> None:
        pair, client = scene.pair, scene.begin()
        keeper, spun = guest_pid(scene.directory / "p"), int(pair.ask(SPIN_PORT, "x"))

        pair.kill_daemon()
        scene.nothing_reaches(client)
        assert guest_pid(scene.directory / "p") == keeper
        scene.restart_primary()
        scene.goes_on(client)
        assert guest_pid(scene.directory / "p") == keeper
        assert int(pair.ask(SPIN_PORT, "x")) > spun

        pair.kill_daemon(keeper=True)
        scene.nothing_reaches(client)
        scene.restart_primary()
        scene.goes_on(client)
        assert guest_pid(scene.directory / "p") not in (0, keeper)
        assert wish(pair.primary.socket, "verify", timeout=PATIENCE)["equal"]

        pair.kill_host()
        pair.promote()
        scene.goes_on(client)
        scene.patterns_go_on()
        scene.is_consecutive(client)

    tell(story, spin=True, patterns=(16, 5000))


def test_detached_nothing_is_left_in_qemu_and_it_can_be_attached_to_again(tell: Tell) -> None:
    def story(scene: Scene) -> None:
        pair = scene.pair
        pair.boot()
        client = scene.client()
        before = scene.in_qemu()
        pair.attach()
        for how in ("command", "signal"):
            pair.wait_protected(PATIENCE)
            scene.goes_on(client)
            _detach(pair, how)
            scene.goes_on(client, 300)
            assert scene.in_qemu() == before
            assert not guest_pid(scene.directory / "p")
            pair.restart_primary()
        pair.wait_protected(PATIENCE)
        scene.goes_on(client)
        pair.kill_host()
        pair.promote()
        scene.goes_on(client)
        scene.patterns_go_on()
        scene.is_consecutive(client)

    tell(story, patterns=(16, 5000))


def _detach(pair: QemuPair, how: str) -> None:
    """By the command, or by SIGTERM; the daemon ends with 0."""
    process = pair.primary._process
    assert process is not None
    if how == "command":
        command = [sys.executable, "-m", "ckptd", "detach", "--socket", str(pair.primary.socket), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
        assert done.returncode == 0, done.stdout + done.stderr
        answer = json.loads(done.stdout)
        assert (answer["guest"], answer["output_flows"], answer["epoch"] > 0) == ("demo", True, True)
    else:
        process.terminate()
    assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize("private", [False, True], ids=["shared", "private"])
def test_a_host_that_dies_at_any_moment_loses_no_page_and_no_number(private: bool, tell: Tell) -> None:
    """Two network cards; each has its own client."""

    def story(scene: Scene) -> None:
        pair, first = scene.pair, scene.begin()
        second = scene.client(card=1)
        scene.goes_on(second)
        scene.check()
        time.sleep(random.uniform(0, 0.1))
        pair.kill_host()
        pair.promote()
        scene.goes_on(first)
        scene.goes_on(second)
        scene.patterns_go_on()
        told = []
        for one in (first, second):
            one.stop()
            assert one.error == ""
            numbers = [number for number, _ in one.numbers]
            assert numbers == sorted(numbers)
            told += numbers
        # Both count with the same counter: between them they were told every number once.
        assert sorted(told) == list(range(min(told), max(told) + 1))

    tell(story, cards=2, private=private, patterns=(32, 8000), dirty=(4000, 16))


def test_a_switchover_takes_the_connection_along_and_the_old_qemu_quits(tell: Tell) -> None:
    def story(scene: Scene) -> None:
        pair, client = scene.pair, scene.begin()
        process, daemon = pair._qemu, pair.primary._process
        assert process is not None and daemon is not None
        command = [sys.executable, "-m", "ckptd", "switchover", "--socket", str(pair.primary.socket), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(done.stdout)["term"] == 2
        assert process.wait(PATIENCE) == 0
        assert daemon.wait(PATIENCE) == 0
        scene.goes_on(client)
        assert pair.secondary.status()["guests"][0]["condition"] == "promoted"
        scene.patterns_go_on()
        scene.is_consecutive(client)

    tell(story, patterns=(16, 5000))


def test_what_is_written_while_the_devices_are_saved_is_in_the_epoch() -> None:
    """As a device may do it: after the dirty log was taken, through QEMU's own page table."""

    async def run(vm: Counting) -> None:
        guest = QemuGuest("vm", QemuSpec(vm.qmp), vm.runtime)
        await guest.attach()
        try:
            await guest.pause()
            guest.tracker.start()
            await guest.save_state()
            await guest.resume()
            await guest.pause()
            taken = guest.tracker.harvest()
            place = backends_of(guest.survey)[0].address
            assert place is not None
            page = guest.geometry.regions[0].pages - 3
            assert not taken.overflowed and page not in taken.gfns[0]
            with open(f"/proc/{vm.pid}/mem", "r+b", buffering=0) as memory:
                memory.seek(place + page * PAGE_SIZE)
                memory.write(b"late")
            await guest.save_state(go_on=True)
            late = guest.late()
            assert late is not None and page in late.gfns[0]
            row = np.empty((1, PAGE_SIZE), dtype=np.uint8)
            guest.read_pages(0, np.array([page], dtype=np.int64), row)
            assert row[0, :4].tobytes() == b"late"
            await guest.resume()
        finally:
            await guest.detach()

    with counting() as vm:
        asyncio.run(run(vm))


# --- deaths on the secondary's host


def test_a_standby_that_dies_is_replaced_and_without_one_a_promotion_is_cold_and_right(tell: Tell) -> None:
    def story(scene: Scene) -> None:
        pair, client = scene.pair, scene.begin()
        first = scene.standby()["pid"]
        pair.kill_standby()
        wait_for(lambda: scene.standby()["pid"] not in (0, first), "another standby", PATIENCE)
        again = scene.standby()
        assert (again["replaced"], again["prepared"], again["active"]) == (1, True, False)
        scene.goes_on(client)
        pair.kill_host()
        pair.kill_standby()
        pair.promote()
        promoted = scene.standby()
        assert promoted["active"] and promoted["pid"] not in (0, first, again["pid"])
        scene.goes_on(client)
        scene.patterns_go_on()
        scene.is_consecutive(client)

    tell(story, patterns=(16, 5000))


def test_without_its_secondary_a_guest_is_held_then_stopped_and_goes_on_when_it_is_back(tell: Tell) -> None:
    def story(scene: Scene) -> None:
        pair, client = scene.pair, scene.begin()
        pair.kill_secondary()
        scene.nothing_reaches(client)
        assert pair.primary.status()["condition"] == "unprotected"
        flag = scene.directory / "p" / STOPPED_FILE
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as pings:

            def stands() -> bool:
                for number in range(20):
                    pings.sendto(_ping(number, 1200), ("10.0.2.15", 0))
                return flag.read_bytes()[16:17] == b"\1" and scene.memory() == scene.memory()

            wait_for(stands, "the guest is stopped", PATIENCE)
        before, numbers = scene.memory(), len(client.numbers)
        time.sleep(1)
        assert scene.memory() == before
        status = pair.primary.status()
        assert status["condition"] == "unprotected"
        assert status["guest_facts"]["held_bytes"] > 64 << 10
        assert len(client.numbers) == numbers and not client.error

        pair.restart_secondary()
        pair.wait_protected(PATIENCE)
        scene.goes_on(client)
        scene.computes()
        assert wish(pair.primary.socket, "verify", timeout=PATIENCE)["equal"]
        pair.kill_host()
        pair.promote()
        scene.goes_on(client)
        scene.patterns_go_on()
        scene.is_consecutive(client)

    tell(story, gate_kib=64, patterns=(16, 5000))


def _ping(number: int, size: int) -> bytes:
    """An ICMP echo request, which is answered with as many bytes."""
    packet = struct.pack(">BBHHH", 8, 0, 0, 77, number) + bytes(size)
    total = sum(struct.unpack(f">{len(packet) // 2}H", packet))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~(total + (total >> 16)) & 0xFFFF
    return packet[:2] + struct.pack(">H", checksum) + packet[4:]
