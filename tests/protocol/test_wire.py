"""Frame headers: every field checked, every limit before anything is allocated."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import CorruptFrame, LocalProtocolError, VersionMismatch
from ckptd.protocol.wire import HEADER_SIZE, LIMITS, Header, Type, pack_frame, unpack_header

GOOD = Header(Type.COMMIT, term=3, epoch=7, sequence=11, meta_length=100, payload_length=0, meta_crc=0xABCD)
U64 = st.integers(0, (1 << 64) - 1)


def fixed(data: bytes) -> bytes:
    """With the right header checksum."""
    return data[:44] + struct.pack("<I", crc32c(data[:44]))


@given(st.sampled_from(Type), U64, U64, U64, st.data())
def test_a_header_goes_there_and_back(kind: Type, term: int, epoch: int, sequence: int, data: Any) -> None:
    meta, payload = (data.draw(st.integers(0, most)) for most in LIMITS[kind])
    header = Header(kind, term, epoch, sequence, meta, payload, data.draw(st.integers(0, 0xFFFFFFFF)), 1)
    packed = header.pack()
    assert len(packed) == HEADER_SIZE and unpack_header(packed) == header


def test_the_layout_is_the_documented_one() -> None:
    packed = Header(Type.PAGES, 1, 2, 3, 4, 5, 6).pack()
    assert packed[:8] == b"CKPD\x02\x06\x00\x00"
    assert struct.unpack("<QQQIIII", packed[8:]) == (1, 2, 3, 4, 5, 6, crc32c(packed[:44]))


@pytest.mark.parametrize("bit", range(HEADER_SIZE * 8))
def test_no_flipped_bit_gets_through(bit: int) -> None:
    packed = bytearray(GOOD.pack())
    packed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptFrame):
        unpack_header(packed)


@pytest.mark.parametrize(
    ("at", "value", "field", "error"),
    [
        (0, b"CKPE", "magic", CorruptFrame),
        (4, b"\x00", None, VersionMismatch),
        (4, b"\x03", None, VersionMismatch),
        (5, b"\x00", "type", CorruptFrame),
        (5, b"\x12", "type", CorruptFrame),
        (6, b"\x01\x00", "flags", CorruptFrame),
        (6, b"\x00\x80", "flags", CorruptFrame),
        (32, struct.pack("<I", (64 << 10) + 1), "meta_length", CorruptFrame),
        (36, struct.pack("<I", 1), "payload_length", CorruptFrame),
    ],
)
def test_each_field_is_checked_even_with_the_right_checksum(
    at: int, value: bytes, field: str | None, error: type[CorruptFrame]
) -> None:
    packed = GOOD.pack()
    with pytest.raises(error) as caught:
        unpack_header(fixed(packed[:at] + value + packed[at + len(value) :]))
    assert caught.value.where.get("field") == field
    assert caught.value.code == ("version" if error is VersionMismatch else "corrupt")


@pytest.mark.parametrize("kind", Type)
def test_each_type_has_its_limits(kind: Type) -> None:
    meta, payload = LIMITS[kind]
    assert unpack_header(Header(kind, 1, 1, 1, meta, payload, 0).pack()).payload_length == payload
    for lengths, field in (((meta + 1, payload), "meta_length"), ((meta, payload + 1), "payload_length")):
        with pytest.raises(CorruptFrame) as caught:
            unpack_header(Header(kind, 1, 1, 1, *lengths, 0).pack())
        assert caught.value.where == {"field": field, "frame": kind.name}


def test_limits_are_checked_before_anything_is_allocated() -> None:
    huge = Header(Type.STATE, 1, 1, 1, 0xFFFFFFFF, 0xFFFFFFFF, 0).pack()
    tracemalloc.start()
    try:
        with pytest.raises(CorruptFrame):
            unpack_header(huge)
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()


def test_what_no_receiver_takes_is_not_sent() -> None:
    with pytest.raises(LocalProtocolError, match="STATE"):
        pack_frame(Type.STATE, b"", (64 << 20) + 1, term=1, epoch=1, sequence=1)
    with pytest.raises(LocalProtocolError, match="ACK"):
        pack_frame(Type.ACK, b"", 1, term=1, epoch=1, sequence=1)
