"""The reader: however a stream is cut, the same frames come out; half a frame is never one."""

from __future__ import annotations

import random

import pytest

from ckptd.errors import CorruptFrame
from ckptd.protocol.messages import Bye, Commit, Heartbeat, State
from ckptd.protocol.reader import Frame, FrameReader
from ckptd.protocol.wire import HEADER_SIZE, MAX_META, Header

from .world import message_frame

PAYLOAD = bytes(range(256)) * 40
STREAM = [
    message_frame(Heartbeat()),
    message_frame(State(7), PAYLOAD, sequence=1),
    message_frame(Commit(1, bytes(16), bytes(16), "memory", False), sequence=2),
    message_frame(State(0), sequence=3),
    message_frame(Bye("x" * 900), sequence=4),
]


def placed(header: Header, meta: bytes) -> memoryview:
    return memoryview(bytearray(header.payload_length))


def read(reader: FrameReader, data: bytes, step: int) -> list[Frame]:
    found, at = [], 0
    while at < len(data):
        area = reader.buffer()
        assert len(area)
        count = min(step, len(area), len(data) - at)
        area[:count] = data[at : at + count]
        reader.received(count)
        at += count
        while (frame := reader.next_frame()) is not None:
            found.append(frame)
    return found


def packed(found: list[Frame]) -> bytes:
    return b"".join(frame.header.pack() + frame.meta + bytes(frame.payload) for frame in found)


@pytest.mark.parametrize("step", [1, 2, 3, 7, 47, 48, 49, 1000, 1 << 20])
def test_any_step_yields_the_same_frames(step: int) -> None:
    reader = FrameReader(placed)
    assert packed(read(reader, b"".join(STREAM), step)) == b"".join(STREAM)
    assert not reader.in_frame


def test_random_steps_over_a_long_stream() -> None:
    chance = random.Random(5)
    stream = [message_frame(State(7), PAYLOAD * chance.randrange(4), sequence=number) for number in range(200)]
    reader, data, found = FrameReader(placed), b"".join(stream), []
    while data:
        count = chance.randrange(1, 100_000)
        found += read(reader, data[:count], chance.choice([100, 5_000, 1 << 20]))
        data = data[count:]
    assert packed(found) == b"".join(stream)


@pytest.mark.parametrize("number", range(len(STREAM)))
def test_a_frame_cut_at_any_byte_is_no_frame(number: int) -> None:
    data = message = STREAM[number][:7] + STREAM[number][7:]
    before = b"".join(STREAM[:number])
    for cut in range(1, len(data), 1 if len(data) < 2000 else 97):
        reader = FrameReader(placed)
        assert len(read(reader, before + message[:cut], 1 << 20)) == number
        assert reader.in_frame
        assert len(read(reader, message[cut:], 1 << 20)) == 1
        assert not reader.in_frame


def test_sequence_numbers_must_follow() -> None:
    for stream in ([STREAM[0], STREAM[0]], [STREAM[1]], [STREAM[0], STREAM[2]]):
        with pytest.raises(CorruptFrame) as caught:
            read(FrameReader(placed), b"".join(stream), 1 << 20)
        assert caught.value.where["field"] == "sequence"
    assert len(read(FrameReader(placed, check_sequence=False), STREAM[0] * 2, 1 << 20)) == 2


def test_a_changed_meta_is_corrupt() -> None:
    changed = bytearray(STREAM[4])
    changed[HEADER_SIZE + 10] ^= 1
    with pytest.raises(CorruptFrame) as caught:
        read(FrameReader(placed, check_sequence=False), bytes(changed), 1 << 20)
    assert caught.value.where == {"frame": "BYE", "field": "meta_crc"}


def test_payloads_are_received_where_they_belong() -> None:
    home = memoryview(bytearray(len(PAYLOAD)))
    reader = FrameReader(lambda header, meta: home)
    head = message_frame(State(7), PAYLOAD)[: -len(PAYLOAD)]
    assert read(reader, head, 1 << 20) == []
    area = reader.buffer()
    assert len(area) == len(home)
    area[:] = PAYLOAD
    assert bytes(home) == PAYLOAD  # no buffer of the reader's own in between
    reader.received(len(PAYLOAD))
    assert reader.next_frame() is not None


def test_the_scratch_buffer_never_grows() -> None:
    reader = FrameReader(placed)
    size = reader._scratch.nbytes
    read(reader, b"".join(STREAM), 10_000)
    assert reader._scratch.nbytes == size == 2 * (HEADER_SIZE + MAX_META)
