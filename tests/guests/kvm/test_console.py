"""The console's socket without a guest behind it: who reads, who does not, and who comes late."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from ckptd.guests.kvm.console import ConsoleServer
from ckptd.guests.kvm.devices import MAX_INPUT, Console
from ckptd.guests.kvm.gate import KvmGate, gate_bytes


class Bench:
    def __init__(self, place: Path) -> None:
        self.path = place / "console.sock"
        self.server = ConsoleServer(self.path)
        self.console = Console()
        self.gate = KvmGate(np.zeros(gate_bytes(1 << 16), dtype=np.uint8))
        self.server.listen()

    def client(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        fd = os.open(self.path.parent, os.O_PATH)
        sock.connect(f"/proc/self/fd/{fd}/{self.path.name}")
        os.close(fd)
        sock.settimeout(5)
        self.turn()
        return sock

    def turn(self) -> bool:
        ready = select.select(self.server.descriptors, [], [], 0)[0]
        return self.server.serve(ready, self.console, self.gate)

    def says(self, data: bytes) -> None:
        assert self.gate.emit(data) == len(data)
        self.gate.release(self.gate.written)
        self.turn()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    one = Bench(tmp_path)
    yield one
    one.server.close()
    assert not one.path.exists()


def test_everybody_hears_what_is_released_from_their_coming_on(bench: Bench) -> None:
    bench.says(b"nobody hears this")
    one = bench.client()
    bench.says(b"first ")
    other = bench.client()
    bench.says(b"second")
    assert (one.recv(100), other.recv(100)) == (b"first second", b"second")
    bench.gate.emit(b"held")
    bench.turn()
    assert select.select([one], [], [], 0)[0] == []
    assert bench.gate.sent == bench.gate.released


def test_what_is_typed_arrives_and_who_leaves_is_forgotten(bench: Bench) -> None:
    one, other = bench.client(), bench.client()
    one.sendall(b"a\n")
    other.sendall(b"b\n")
    assert bench.turn()
    assert sorted([bench.console.line(), bench.console.line()]) == [b"a\n", b"b\n"]
    one.close()
    assert not bench.turn()
    assert len(bench.server.descriptors) == 2
    bench.says(b"still heard")
    assert other.recv(100) == b"still heard"


def test_a_client_that_does_not_read_is_dropped_and_stalls_nobody(bench: Bench) -> None:
    deaf, good = bench.client(), bench.client()
    heard = 0
    for _ in range(20):
        bench.says(b"x" * 50_000)
        while heard < bench.gate.sent:
            heard += len(good.recv(1 << 20))
    assert heard == bench.gate.written == 1_000_000
    left = 0
    while data := deaf.recv(1 << 20):
        left += len(data)
    assert left < heard


def test_input_beyond_what_the_console_holds_stays_with_its_sender(bench: Bench) -> None:
    one = bench.client()
    one.setblocking(False)
    sent = 0
    for _ in range(100):
        with suppress(BlockingIOError):
            sent += one.send(b"y" * 4095 + b"\n")
        bench.turn()
    assert bench.console.room == 0 and sent > MAX_INPUT
    taken = 0
    while line := bench.console.line():
        taken += len(line)
        bench.turn()
    assert taken == sent


def test_more_than_sixteen_are_sent_away(bench: Bench) -> None:
    clients = [bench.client() for _ in range(17)]
    assert clients[16].recv(1) == b""
    bench.says(b"x")
    assert all(client.recv(1) == b"x" for client in clients[:16])
