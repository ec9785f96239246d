"""Frames: the fixed header before every message, on the link, in a staged epoch, in a journal segment, in a recording.

    0        4    5    6       8                16               24               32
    +--------+----+----+-------+----------------+----------------+----------------+
    | "CKPD" | ver| typ| flags | term       u64 | epoch      u64 | sequence   u64 |
    +--------+----+----+-------+-------+--------+--------+-------+--------+-------+
    | meta length u32 | payload length u32 | meta crc32c u32 | header crc32c u32   |
    +-----------------+--------------------+-----------------+---------------------+
    32                36                   40                44                    48

then the meta (msgpack, or the fixed layout of PAGES) and the payload (bytes that are never parsed by msgpack). All
integers are little-endian. The header crc covers bytes 0 to 43. Lengths are checked against the limits of the type
before anything is allocated. Knows no message's content.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from crc32c import crc32c

from ckptd.errors import CorruptFrame, LocalProtocolError, VersionMismatch
from ckptd.memory.hashing import HASH_SIZE
from ckptd.units import PAGE_SIZE

__all__ = [
    "HEADER_SIZE", "LIMITS", "MAGIC", "MAX_BATCH_PAGES", "MAX_META", "OLDEST_VERSION", "VERSION", "Buffer", "Header",
    "Type", "pack_frame", "unpack_header",
]  # fmt: skip

MAGIC = b"CKPD"
VERSION = 2
OLDEST_VERSION = 1
"""Version 1 lacks delta pages; everything else is the same."""
HEADER_SIZE = 48
_FIELDS = struct.Struct("<4sBBHQQQIII")
_CRC = struct.Struct("<I")

Buffer = bytes | bytearray | memoryview


class Type(IntEnum):
    """What a frame carries. Numbers are for ever."""

    HELLO = 1
    WELCOME = 2
    NACK = 3
    TABLE_REQUEST = 4
    TABLE = 5
    PAGES = 6
    ITERATION = 7
    STATE = 8
    OUTPUT = 9
    COMMIT = 10
    ACK = 11
    HEARTBEAT = 12
    HANDOVER = 13
    PROMOTED = 14
    VERIFY = 15
    VERIFIED = 16
    BYE = 17


MAX_BATCH_PAGES = 4096
"""Pages that one PAGES frame may name; their raw bytes may be at most 16 MiB."""
_CONTROL = 64 << 10
_PAGES_META = 24 + MAX_BATCH_PAGES * (4 + HASH_SIZE + 1)
MAX_META = max(_CONTROL, _PAGES_META)
_BLOBS = 64 << 20

# type -> (largest meta, largest payload), bytes
LIMITS: dict[Type, tuple[int, int]] = {kind: (_CONTROL, 0) for kind in Type}
LIMITS[Type.TABLE] = (_CONTROL, 4 << 20)
LIMITS[Type.PAGES] = (_PAGES_META, MAX_BATCH_PAGES * PAGE_SIZE)
LIMITS[Type.STATE] = (_CONTROL, _BLOBS)
LIMITS[Type.OUTPUT] = (_CONTROL, _BLOBS)


@dataclass(frozen=True, slots=True)
class Header:
    """One frame's header: where it belongs and how long it is."""

    type: Type
    term: int
    epoch: int
    sequence: int
    meta_length: int
    payload_length: int
    meta_crc: int
    version: int = VERSION
    flags: int = 0

    @property
    def frame_length(self) -> int:
        return HEADER_SIZE + self.meta_length + self.payload_length

    def pack(self) -> bytes:
        head = _FIELDS.pack(
            MAGIC, self.version, self.type, self.flags, self.term, self.epoch, self.sequence,
            self.meta_length, self.payload_length, self.meta_crc,
        )  # fmt: skip
        return head + _CRC.pack(crc32c(head))


def pack_frame(
    kind: Type, meta: bytes, payload_length: int, *, term: int, epoch: int, sequence: int, version: int = VERSION
) -> bytes:
    """Header and meta as one small buffer; the payload's buffers follow it on the wire as they are.

    Raises LocalProtocolError for a frame that no receiver would take.
    """
    max_meta, max_payload = LIMITS[kind]
    if len(meta) > max_meta or payload_length > max_payload:
        raise LocalProtocolError(
            f"a {kind.name} frame of {len(meta)} + {payload_length} bytes; at most {max_meta} + {max_payload}",
            epoch=epoch,
        )
    return Header(kind, term, epoch, sequence, len(meta), payload_length, crc32c(meta), version).pack() + meta


def unpack_header(data: Buffer) -> Header:
    """The header in the first 48 bytes. Raises CorruptFrame or VersionMismatch; nothing has been allocated by then."""
    magic, version, kind, flags, term, epoch, sequence, meta_length, payload_length, meta_crc = _FIELDS.unpack_from(
        data
    )
    if magic != MAGIC:
        raise CorruptFrame(f"a frame starts with {magic!r}, not {MAGIC!r}", field="magic")
    (stated,) = _CRC.unpack_from(data, _FIELDS.size)
    if stated != crc32c(memoryview(data)[: _FIELDS.size]):
        raise CorruptFrame("the checksum of a frame's header differs", field="header_crc")
    if not OLDEST_VERSION <= version <= VERSION:
        raise VersionMismatch(
            f"a frame of protocol version {version}; this side speaks {OLDEST_VERSION} to {VERSION}",
            hint="run versions of ckptd that are at most one protocol version apart",
        )
    try:
        type_ = Type(kind)
    except ValueError:
        raise CorruptFrame(f"there is no frame type {kind}", field="type") from None
    if flags:
        raise CorruptFrame(f"flags {flags:#x} are not defined", field="flags", frame=type_.name)
    max_meta, max_payload = LIMITS[type_]
    if meta_length > max_meta:
        raise CorruptFrame(f"meta of {meta_length} bytes; at most {max_meta}", field="meta_length", frame=type_.name)
    if payload_length > max_payload:
        raise CorruptFrame(
            f"payload of {payload_length} bytes; at most {max_payload}", field="payload_length", frame=type_.name
        )
    return Header(type_, term, epoch, sequence, meta_length, payload_length, meta_crc, version, flags)
