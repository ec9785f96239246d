"""What both machines share: numbering and timing what is sent, reading and timing what arrives, the transition table.

A machine never does I/O. The daemon receives into `buffer()`, reports with `received(count, now)`, asks `next_event()`
until it returns None, sends the lists of buffers that the methods return, in order and unchanged, and calls `tick(now)`
about four times in each heartbeat interval. `now` is a monotonic clock in ns. A machine that has raised is done for:
the daemon sends what `nack` returns, closes, and makes a new one for the next connection.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, NoReturn

from crc32c import crc32c

from ckptd.errors import (
    CkptdError,
    CorruptFrame,
    DigestMismatch,
    EpochGap,
    LocalProtocolError,
    NoSpace,
    RemoteProtocolError,
    TransportError,
)  # fmt: skip
from ckptd.protocol.messages import Bye, Heartbeat, Message, Nack, clip, encode
from ckptd.protocol.reader import FrameReader
from ckptd.protocol.wire import OLDEST_VERSION, Buffer, Header, Type, pack_frame

__all__ = ["Buffers", "Event", "Peer", "PeerClosed", "Timing", "check_crc"]

Buffers = list[Buffer]


class Event:
    """Something that the daemon must know or do."""


@dataclass(frozen=True, slots=True)
class PeerClosed(Event):
    """The peer closed on purpose: it said NACK (with its code) or BYE (code "bye")."""

    code: str
    text: str
    epoch: int
    term: int


@dataclass(frozen=True, slots=True)
class Timing:
    """ns: send something at least every `heartbeat`; the peer is lost after `timeout` of silence."""

    heartbeat: int
    timeout: int


class Peer(ABC):
    """One end of one connection. Subclasses set `TRANSITIONS`: (state, trigger) -> state; anything else is an error.

    Triggers are frame types by name ("PAGES") for what arrives, method names ("acknowledge") for what the daemon does.
    In the states of `BUSY` the machine waits for its own daemon: no frame is looked at, and silence is no sign.
    """

    TRANSITIONS: ClassVar[Mapping[tuple[Enum, str], Enum]]
    BUSY: ClassVar[frozenset[Enum]] = frozenset()

    def __init__(self, reader: FrameReader, state: Enum, timing: Timing, now: int) -> None:
        self._reader = reader
        self.state = self._first = state
        self.term = 0
        self.version = OLDEST_VERSION  # until WELCOME settles it: an older peer must be able to read what comes before
        self._timing = timing
        self._now = self._sent = self._heard = now
        self._sequence = 0

    def buffer(self) -> memoryview:
        """Where to receive the next bytes."""
        return self._reader.buffer()

    def received(self, count: int, now: int) -> None:
        """`count` bytes arrived in the last `buffer()`."""
        self._reader.received(count)
        self._now = self._heard = now

    @abstractmethod
    def next_event(self) -> Event | None:
        """What the daemon must know or do next; None: more must arrive. Raises RemoteProtocolError, ReplicaError."""

    def end_of_stream(self) -> None:
        """The peer closed the stream. Raises CorruptFrame if that cut a frame."""
        if self._reader.in_frame and not self._closed:
            raise CorruptFrame("the stream ends in the middle of a frame", term=self.term)

    def tick(self, now: int, *, listening: bool = True) -> Buffers:
        """A heartbeat, if one is due. Raises TransportError when the peer has been silent for too long.

        `listening` is False while the daemon reads nothing on purpose: silence proves nothing then.
        """
        self._now = now
        if not listening or self.state in self.BUSY:
            self._heard = now
        if self._closed:
            return []
        if now - self._heard > self._timing.timeout:
            raise TransportError(f"nothing heard from the peer for {(now - self._heard) / 1e6:.0f} ms", term=self.term)
        if not self._talking or now - self._sent < self._timing.heartbeat:
            return []
        return self._send(Heartbeat(), 0)

    @property
    def _closed(self) -> bool:
        """The last word was said."""
        return self.state is not self._first and not self._talking

    @property
    def _talking(self) -> bool:
        """Both sides beat from HELLO on until the last word."""
        return (self.state, "HEARTBEAT") in self.TRANSITIONS

    def retime(self, timing: Timing) -> None:
        """New intervals from a changed configuration."""
        self._timing = timing

    def nack(self, error: CkptdError) -> Buffers:
        """What to tell the peer before closing on it."""
        code = error.code if isinstance(error, RemoteProtocolError) else _CODES.get(type(error), "failed")
        epoch = error.where.get("epoch")
        return self._close_with(code, str(error), epoch if isinstance(epoch, int) else 0)

    def bye(self, text: str) -> Buffers:
        """Close on purpose."""
        self._step("bye")
        return self._send(Bye(clip(text)), 0)

    def _close_with(self, code: str, text: str, epoch: int = 0, term: int = 0) -> Buffers:
        self._step("nack")
        return self._send(Nack(code, clip(text), epoch, term), 0)

    def _heard_out(self, header: Header, message: Message) -> PeerClosed:
        """The peer's last word."""
        if isinstance(message, Nack):
            return PeerClosed(message.code, message.text, message.epoch, message.term)
        assert isinstance(message, Bye)
        return PeerClosed("bye", message.text, header.epoch, header.term)

    def _step(self, trigger: str, frame: Header | None = None) -> None:
        """Follow the transition table. A frame that it lacks is the peer's fault, a method that it lacks is ours."""
        after = self.TRANSITIONS.get((self.state, trigger))
        if after is not None:
            self.state = after
        elif frame is not None:
            self._refuse_frame(frame)
        else:
            raise LocalProtocolError(f"{trigger} is not allowed here", state=self.state.name)

    def _refuse_frame(self, frame: Header) -> NoReturn:
        raise RemoteProtocolError(
            "a frame that is not allowed here", frame=frame.type.name, state=self.state.name, epoch=frame.epoch
        )

    def _send(self, message: Message, epoch: int, *payload: Buffer) -> Buffers:
        return self._frame(message.TYPE, encode(message), epoch, *payload)

    def _frame(self, kind: Type, meta: bytes, epoch: int, *payload: Buffer) -> Buffers:
        length = sum(memoryview(part).nbytes for part in payload)
        head = pack_frame(
            kind, meta, length, term=self.term, epoch=epoch, sequence=self._sequence, version=self.version
        )
        self._sequence += 1
        self._sent = self._now
        return [head, *payload]


_CODES: dict[type[CkptdError], str] = {EpochGap: "gap", DigestMismatch: "digest", NoSpace: "no_space"}


def check_crc(payload: Buffer, stated: int, header: Header) -> None:
    """Raises CorruptFrame unless the payload has the stated crc32c."""
    if crc32c(payload) != stated:
        raise CorruptFrame("the checksum of a payload differs", frame=header.type.name, epoch=header.epoch)
