"""Bytes in, frames out: the receiving half of a connection, without a socket and without copying page bytes.

The caller receives into `buffer()` and reports with `received(n)`; `next_frame()` yields each whole frame. Headers,
metas and small payloads pass through a scratch buffer of fixed size; the rest of a payload is received where
`place(header, meta)` says it must end up: in the guest's image, or in the staged epoch. Memory is bounded by the
scratch buffer and by what `place` hands out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from crc32c import crc32c

from ckptd.errors import CorruptFrame
from ckptd.protocol.wire import HEADER_SIZE, MAX_META, Header, unpack_header

__all__ = ["Frame", "FrameReader", "Place"]


@dataclass(frozen=True, slots=True)
class Frame:
    """One whole frame. `payload` is the buffer that `place` gave, now filled."""

    header: Header
    meta: bytes
    payload: memoryview


_WINDOW = 8 << 10  # holds header and meta of a batch of 256 pages, and many control frames
_LEAST = 512

Place = Callable[[Header, bytes], memoryview]


class FrameReader:
    """Cuts a byte stream into frames; checks header, lengths, meta checksum and sequence."""

    def __init__(self, place: Place, *, check_sequence: bool = True) -> None:
        self._place = place
        self._check_sequence = check_sequence
        self._scratch = memoryview(bytearray(2 * (HEADER_SIZE + MAX_META)))
        self._begin = self._end = 0
        self._header: Header | None = None
        self._meta = b""
        self._payload: memoryview | None = None
        self._filled = 0
        self._sequence = 0

    def buffer(self) -> memoryview:
        """Where the next bytes go; never empty."""
        if self._payload is not None and self._begin == self._end and self._filled < len(self._payload):
            return self._payload[self._filled :]
        if self._begin == self._end:
            self._begin = self._end = 0
        elif self._end + HEADER_SIZE + MAX_META > len(self._scratch):
            rest = bytes(self._scratch[self._begin : self._end])
            self._scratch[: len(rest)] = rest
            self._begin, self._end = 0, len(rest)
        # A small window: what follows a meta is page bytes, and those that come through here are copied once more.
        wanted = _WINDOW if self._header is None else self._header.meta_length
        missing = max(wanted - (self._end - self._begin), _LEAST)
        return self._scratch[self._end : self._end + missing]

    def received(self, count: int) -> None:
        """`count` bytes were written to the start of what `buffer()` last returned."""
        if self._payload is not None and self._begin == self._end and self._filled < len(self._payload):
            self._filled += count
        else:
            self._end += count

    @property
    def in_frame(self) -> bool:
        """Part of a frame has arrived: the end of the stream here is a truncated frame."""
        return self._begin != self._end or self._header is not None

    def next_frame(self) -> Frame | None:
        """The next whole frame, or None until more bytes arrive. Raises CorruptFrame; the stream is then unusable."""
        if self._header is None:
            if self._end - self._begin < HEADER_SIZE:
                return None
            header = unpack_header(self._scratch[self._begin : self._begin + HEADER_SIZE])
            if self._check_sequence and header.sequence != self._sequence:
                raise CorruptFrame(
                    f"frame {header.sequence} came where {self._sequence} is due: replayed, lost or out of order",
                    frame=header.type.name, field="sequence",
                )  # fmt: skip
            self._begin += HEADER_SIZE
            self._header = header
        header = self._header
        if self._payload is None:
            if self._end - self._begin < header.meta_length:
                return None
            self._meta = bytes(self._scratch[self._begin : self._begin + header.meta_length])
            if crc32c(self._meta) != header.meta_crc:
                raise CorruptFrame("the checksum of a frame's meta differs", frame=header.type.name, field="meta_crc")
            self._begin += header.meta_length
            self._payload = self._place(header, self._meta)
            self._filled = 0
        missing = len(self._payload) - self._filled
        if missing and self._begin < self._end:
            taken = min(missing, self._end - self._begin)
            self._payload[self._filled : self._filled + taken] = self._scratch[self._begin : self._begin + taken]
            self._begin += taken
            self._filled += taken
            missing -= taken
        if missing:
            return None
        frame = Frame(header, self._meta, self._payload)
        self._header, self._payload = None, None
        self._sequence += 1
        return frame
