"""The gate against socketpairs in QEMU's place: order, wholeness, marks, bounds, and a model of it under chance."""

from __future__ import annotations

import os
import random
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import pytest

from ckptd.errors import GuestError
from ckptd.guests.qemu import gate as module
from ckptd.guests.qemu.gate import GATE_BYTES, Holder, QemuGate


def packet(text: bytes) -> bytes:
    return len(text).to_bytes(4) + text


def eventually(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.001)


class Stage:
    """Both sides of a gate, and QEMU's ends of its sockets."""

    def __init__(self, lanes: int = 1, capacity: int = 1 << 20) -> None:
        self.notices = 0
        head = np.zeros(GATE_BYTES, dtype=np.uint8)
        self.holder = Holder(head, capacity, self._noticed)
        self.gate = QemuGate(head, self.holder.wake)
        self.out: list[socket.socket] = []
        self.back: list[socket.socket] = []
        self.came = [b""] * lanes
        for lane in range(lanes):
            (ours, theirs), (back, to) = socket.socketpair(), socket.socketpair()
            self.holder.add(f"n{lane}", theirs, back)
            self.out.append(ours)
            self.back.append(to)
            to.setblocking(False)

    def _noticed(self) -> None:
        self.notices += 1

    def read(self, lane: int = 0) -> bytes:
        """All that has come back until now."""
        with suppress(BlockingIOError):
            while data := self.back[lane].recv(1 << 16):
                self.came[lane] += data
        return self.came[lane]

    def close(self) -> None:
        self.holder.close()
        for sock in (*self.out, *self.back):
            sock.close()


@pytest.fixture
def stage() -> Iterator[Stage]:
    one = Stage(2)
    yield one
    one.close()


def test_an_open_gate_lets_everything_pass_and_a_held_one_nothing(stage: Stage) -> None:
    first, second, third = packet(b"one"), packet(b""), packet(b"three")
    stage.out[0].sendall(first)
    eventually(lambda: stage.read() == first)
    stage.holder.hold()
    assert stage.holder.holding and stage.gate.written == stage.gate.released == 1
    stage.out[0].sendall(second)
    stage.out[1].sendall(third)
    eventually(lambda: stage.gate.written == 3)
    assert stage.gate.held_bytes == len(second) + len(third) and stage.gate.held(3) == b""
    assert not select.select(stage.back, [], [], 0.1)[0]
    stage.holder.open()
    eventually(lambda: stage.read(0) == first + second and stage.read(1) == third)
    assert not stage.holder.holding
    eventually(stage.holder.drained)
    stage.out[1].sendall(first)
    eventually(lambda: stage.read(1) == third + first)
    stage.holder.hold()
    stage.out[1].sendall(first)
    assert stage.holder.mark() == 5
    assert not select.select(stage.back, [], [], 0.1)[0]


def test_a_mark_has_everything_that_was_written_before_it_and_nothing_else(stage: Stage) -> None:
    stage.holder.hold()
    for count in range(1, 40):
        pieces = [packet(bytes([count]) * (count * 97 % 301)) for _ in range(3)]
        for number, piece in enumerate(pieces):
            stage.out[number % 2].sendall(piece)
        mark = stage.holder.mark()  # at once: what was written is in the sockets
        assert mark == 4 * count - 1
        stage.out[0].sendall(packet(b"after"))
        before = [stage.read(0), stage.read(1)]
        assert stage.gate.release(mark) == 3 + (count > 1)
        left = packet(b"after") if count > 1 else b""
        expected = [before[0] + left + pieces[0] + pieces[2], before[1] + pieces[1]]
        eventually(lambda: [stage.read(0), stage.read(1)] == expected)  # noqa: B023
        eventually(lambda: stage.gate.written == 4 * count)  # noqa: B023
        assert stage.gate.release(mark) == 0 and stage.gate.release(0) == 0


def test_what_was_not_written_cannot_be_released(stage: Stage) -> None:
    stage.holder.hold()
    stage.out[0].sendall(packet(b"x"))
    assert stage.holder.mark() == 1
    with pytest.raises(GuestError, match="no packet 2 yet"):
        stage.gate.release(2)
    assert stage.gate.released == 0


def test_a_packet_may_be_cut_anywhere(stage: Stage) -> None:
    stage.holder.hold()
    stream = packet(b"abcdef") + packet(b"") + packet(b"gh")
    for cut in range(len(stream)):
        before = stage.gate.written
        whole = sum(cut >= end for end in (10, 14, 20))
        stage.out[0].sendall(stream[:cut])
        assert stage.holder.mark() == before + whole
        stage.gate.release(before + whole)
        stage.out[0].sendall(stream[cut:])
        assert stage.holder.mark() == before + 3
        stage.gate.release(before + 3)
    eventually(lambda: stage.read() == stream * len(stream))


def test_full_and_half_free_are_noticed_once_and_nothing_is_dropped() -> None:
    stage = Stage(capacity=1000)
    try:
        stage.holder.hold()
        for _ in range(10):
            stage.out[0].sendall(packet(bytes(96)))
        assert stage.holder.mark() == 10 and not stage.gate.full
        stage.out[0].sendall(packet(b""))
        eventually(lambda: stage.gate.full)
        stage.out[0].sendall(packet(bytes(5000)) * 19)
        assert stage.holder.mark() == 30
        stage.out[0].sendall(packet(bytes(5000)))
        assert stage.holder.mark() == 31 and stage.holder.full and stage.notices == 1
        assert stage.gate.held_bytes == 1004 + 20 * 5004
        stage.gate.release(30)  # 5004 bytes are left, which is more than half
        eventually(lambda: len(stage.read()) == 1004 + 19 * 5004)
        assert stage.gate.full and stage.notices == 1
        stage.gate.release(31)
        eventually(lambda: not stage.gate.full)
        eventually(lambda: len(stage.read()) == 1004 + 20 * 5004)
        assert stage.notices == 2 and stage.gate.held_bytes == 0
    finally:
        stage.close()


def test_a_qemu_that_does_not_read_fills_the_gate_and_gets_everything_later() -> None:
    stage = Stage(capacity=100_000)
    try:
        sent = b"".join(packet(os.urandom(1400)) for _ in range(700))
        stage.out[0].settimeout(60)
        stage.out[0].sendall(sent)
        eventually(lambda: stage.gate.full)  # not held, but not taken either
        assert stage.gate.held_bytes > 200_000 and not stage.holder.drained()
        eventually(lambda: len(stage.read()) == len(sent))
        assert stage.read() == sent
        eventually(lambda: not stage.gate.full and stage.holder.drained())
    finally:
        stage.close()


def test_a_qemu_whose_guest_stands_is_given_no_more_than_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_QUEUE", 100)
    stage = Stage(capacity=4000)
    try:
        stage.holder.hold()
        stage.holder.stand()
        for count in range(30):
            stage.out[0].sendall(packet(bytes(16)) * 10)
            assert stage.holder.mark() == 10 * count + 10
        assert stage.gate.full
        stage.gate.release(300)
        eventually(lambda: not stage.gate.full)  # the guest may go on: what it has said, may leave
        assert len(stage.read()) == 100 * 20 and not select.select(stage.back, [], [], 0.1)[0]
        assert stage.holder.drained() and stage.holder.leaving_bytes == 200 * 20
        stage.holder.go()
        eventually(lambda: len(stage.read()) == 300 * 20)
        stage.holder.stand()
        stage.out[0].sendall(packet(bytes(16)) * 100)
        stage.gate.release(stage.holder.mark())
        eventually(lambda: len(stage.read()) == 400 * 20)
    finally:
        stage.close()


def test_a_packet_of_absurd_length_stops_everything_and_is_named(stage: Stage) -> None:
    stage.holder.hold()
    stage.out[0].sendall(packet(b"good"))
    assert stage.holder.mark() == 1
    stage.out[1].sendall((1 << 20).to_bytes(4)[:3])
    assert stage.holder.mark() == 1
    stage.out[1].sendall(b"\x01" + bytes(10))
    eventually(lambda: stage.holder.trouble)
    assert "1048577 bytes" in stage.holder.trouble and "n1" in stage.holder.trouble and stage.notices == 1
    for ask in (stage.holder.mark, stage.holder.hold, stage.holder.open):
        with pytest.raises(GuestError, match="1048577 bytes"):
            ask()
    assert not stage.read(0)


def test_qemus_ends_may_close(stage: Stage) -> None:
    stage.holder.hold()
    stage.out[0].sendall(packet(b"last words") + b"\0\0")
    stage.out[0].close()
    eventually(lambda: list(stage.holder.lost()) == ["n0"])
    assert stage.holder.mark() == 1
    stage.gate.release(1)
    eventually(lambda: stage.read(0) == packet(b"last words"))
    stage.back[1].close()
    stage.out[1].sendall(packet(b"to nobody"))
    stage.gate.release(stage.holder.mark())
    eventually(stage.holder.drained)
    assert stage.gate.held_bytes == 0 and list(stage.holder.lost()) == ["n0"] and not stage.holder.trouble


@pytest.mark.parametrize("seed", range(12))
def test_chance_never_makes_it_leak_lose_or_reorder(seed: int) -> None:
    """Against the simplest model: lists of packets, and the last mark of each lane."""
    chance = random.Random(seed)
    lanes = chance.choice([1, 2, 5])
    stage = Stage(lanes, capacity=chance.choice([2000, 1 << 20]))
    said = [b""] * lanes  # whole packets, as they were sent
    rest = [b""] * lanes  # of a packet that was sent in part
    marks: list[tuple[int, list[int]]] = [(0, [0] * lanes)]  # a mark, and how much of each lane is before it
    count, wanted = 0, 0
    try:
        stage.holder.hold()
        for _ in range(400):
            match chance.randrange(6):
                case 0 | 1:
                    lane = chance.randrange(lanes)
                    if rest[lane]:
                        stage.out[lane].sendall(rest[lane])
                        said[lane] += packet(b"half" * 20)
                        rest[lane], count = b"", count + 1
                    for _ in range(chance.randrange(4)):
                        data = packet(os.urandom(chance.choice([0, 1, 60, 1500])))
                        stage.out[lane].sendall(data)
                        said[lane] += data
                        count += 1
                    if chance.random() < 0.3:
                        data = packet(b"half" * 20)
                        cut = chance.randrange(1, len(data))
                        stage.out[lane].sendall(data[:cut])
                        rest[lane] = data[cut:]
                case 2:
                    assert stage.holder.mark() == count
                    marks.append((count, [len(data) for data in said]))
                case 3:
                    mark, _ = chance.choice(marks)
                    stage.gate.release(mark)
                    wanted = max(wanted, mark)
                case 4:
                    chance.choice([stage.holder.stand, stage.holder.go])()
                case 5:
                    lane = chance.randrange(lanes)
                    came = stage.read(lane)
                    assert said[lane].startswith(came)
                    assert len(came) <= next(ends[lane] for mark, ends in reversed(marks) if mark <= wanted)
        stage.holder.go()
        allowed = next(ends for mark, ends in reversed(marks) if mark <= wanted)
        eventually(lambda: all(len(stage.read(lane)) >= allowed[lane] for lane in range(lanes)))
        time.sleep(0.01)
        assert [len(stage.read(lane)) for lane in range(lanes)] == allowed
        stage.gate.release(stage.holder.mark())
        eventually(lambda: [stage.read(lane) for lane in range(lanes)] == said)
        assert stage.gate.held_bytes == 0
    finally:
        stage.close()
