"""Real daemons, a real VM of this machine's KVM, and clients that outlive it."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ckptd.control.client import wish
from ckptd.demo.pair import Moment, Pair, Setting
from ckptd.guests.kvm.machine import TRACKERS
from tests.guests.kvm.machines import needs_kvm, ring_here

pytestmark = [pytest.mark.kvm, needs_kvm]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    for name in ("d", "r"):
        (tmp_path / name).mkdir()
    yield tmp_path


def protected(place: Path, **setting: object) -> Pair:
    options = {"memory": 16 << 20, "kind": "kvm", "workload": "random", "stage_mib": 8, **setting}
    pair = Pair(Setting(**options), place / "d", place / "r", random.Random(5))  # type: ignore[arg-type]
    pair.start()
    pair.wait_protected()
    pair.protect(0.4)
    return pair


@pytest.mark.parametrize("tracker", TRACKERS)
@pytest.mark.parametrize("moment", ["within", "unheard"])
def test_a_failover_is_proved(moment: Moment, tracker: str, place: Path) -> None:
    if tracker == "kvm-ring" and (why := ring_here()):
        pytest.skip(why)
    pair = protected(place, tracker=tracker)
    try:
        killed = pair.kill_primary(moment)
        pair.promote()
        pair.run_on(0.3)
        proof, failures = pair.check()
        assert failures == []
        assert proof.outputs.released > 0 and killed.released > 0
    finally:
        pair.close()


def test_a_ring_that_is_overrun_all_the_time_makes_no_wrong_replica(place: Path) -> None:
    """Its log loses pages in most epochs, says so, and everything is compared and resent."""
    if why := ring_here():
        pytest.skip(why)
    pair = protected(place, tracker="kvm-ring", ring_entries=4096, rate=0, interval_ms=50)
    try:
        for _ in range(3):
            pair.protect(0.5)
            assert wish(pair.primary.socket, "verify", timeout=60)["equal"]
        assert pair.last["guest_facts"]["log_losses"] > 3 and pair.last["rescans"] > 3
        pair.kill_primary()
        pair.promote()
        pair.run_on(0.2)
        assert pair.check()[1] == []
    finally:
        pair.close()


def test_the_proof_finds_a_wrong_byte_a_lost_line_and_names_the_page(place: Path) -> None:
    pair = protected(place, workload="patterns")
    try:
        pair.kill_primary()
        pair.promote()
        pair.secondary.end()
        output = place / "d" / "p" / "output"
        lines = output.read_bytes().splitlines(keepends=True)
        output.write_bytes(b"".join(lines[:3] + lines[4:]))
        with (place / "r" / "demo" / "image-ram").open("r+b") as image:
            image.seek((1 << 24) - 4096 + 100)  # the last page, where no vCPU looks
            image.write(b"\xff")
        pair.secondary.start()
        pair.secondary.wait_ready()
        _, failures = pair.check()
        assert any("pages of the promoted guest are wrong" in one for one in failures)
        assert any("page 4095" in one or "gfn 4095" in one for one in failures), failures
        assert any("outputs are" in one for one in failures)
    finally:
        pair.close()


def test_the_daemon_dies_and_comes_back_to_the_same_guest(place: Path) -> None:
    pair = protected(place)
    try:
        before = pair.primary.status()
        pair.kill_primary(host=False, seconds=0.2)
        pair.restart_primary()
        after = pair.wait_protected()
        assert after["guest_facts"]["pid"] == before["guest_facts"]["pid"]
        assert after["epoch"] > before["epoch"]
        pair.protect(0.3)
        pair.kill_primary()
        pair.promote()
        pair.run_on(0.2)
        assert pair.check()[1] == []
    finally:
        pair.close()


class Store:
    """A client of the kv program: it repeats a request until it is answered, wherever the guest is."""

    def __init__(self) -> None:
        self.number = 0
        self.sock: socket.socket | None = None
        self.rest = b""

    def connect(self, runtime: Path) -> None:
        self.close()
        fd = os.open(runtime, os.O_PATH)
        try:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.connect(f"/proc/self/fd/{fd}/console.sock")
        finally:
            os.close(fd)
        self.sock.settimeout(1.0)
        self.rest = b""

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()

    def ask(self, kind: str, *words: int) -> bytes | None:
        """The answer; None if nobody answers."""
        assert self.sock is not None
        self.number += 1
        name = b"%08x" % self.number
        self.sock.sendall(b" ".join([kind.encode(), name, *(b"%08x" % word for word in words)]) + b"\n")
        with suppress(TimeoutError):
            while True:
                line, found, rest = self.rest.partition(b"\n")
                if not found:
                    data = self.sock.recv(4096)
                    if not data:
                        return None
                    self.rest += data
                    continue
                self.rest = rest
                if line.split(b" ")[1:2] == [name]:
                    return line
        return None


def test_no_set_that_was_answered_is_missing_after_a_failover(place: Path) -> None:
    pair = protected(place, workload="kv")
    store, chance = Store(), random.Random(3)
    answered: dict[int, int] = {}
    asked: dict[int, set[int]] = {}
    try:
        store.connect(place / "d" / "p")
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            key, value = chance.randrange(500), chance.randrange(1 << 32)
            asked.setdefault(key, set()).add(value)
            assert store.ask("S", key, value), "the guest answers"
            answered[key] = value
        assert store.sock is not None
        for key in range(600, 620):  # on its way when the host dies: may be there or not
            store.sock.sendall(b"S %08x %08x %08x\n" % (1 << 20 | key, key, key))
        pair.kill_primary(seconds=0)
        pair.promote()
        store.connect(place / "d" / "s" / "demo")
        assert len(answered) > 20
        for key, value in answered.items():
            reply = store.ask("G", key)
            assert reply is not None and reply.split(b" ")[2:4] == [b"%08x" % key, b"%08x" % value], reply
        for key in range(600, 620):
            reply = store.ask("G", key)
            assert reply is not None and reply.split(b" ")[3] in (b"%08x" % key, b"00000000")
        assert store.ask("S", 1, 2)
    finally:
        store.close()
        pair.close()
