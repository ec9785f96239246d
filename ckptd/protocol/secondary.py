"""The receiving machine: frames of epochs in, decisions out.

It checks every frame before a byte of it can matter and knows what may follow what; collect.py takes in an epoch and
proves it at COMMIT. Only then does the daemon hear EpochReady, and make the epoch permanent. Knows no file, socket or
clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import ClassVar, cast

import numpy as np

from ckptd import __version__
from ckptd.errors import CorruptFrame, EpochGap, RemoteProtocolError, VersionMismatch
from ckptd.protocol.collect import Collector, Holding
from ckptd.protocol.messages import Ack, Hello, Promoted, Table, Verified, Welcome, decode
from ckptd.protocol.peer import Buffers, Event, Peer, Timing
from ckptd.protocol.reader import Frame, FrameReader
from ckptd.protocol.wire import OLDEST_VERSION, VERSION, Header, Type

__all__ = [
    "EpochReady", "HandoverReady", "HelloReceived", "Holding", "SecondaryMachine", "SecondaryState", "TableWanted",
    "VerifyWanted",
]  # fmt: skip

TABLE_ROWS = 1 << 18  # hashes in one TABLE frame: 4 MiB


@dataclass(frozen=True, slots=True)
class HelloReceived(Event):
    """Answer with `welcome` or `refuse`."""

    hello: Hello
    term: int


@dataclass(frozen=True, slots=True)
class TableWanted(Event):
    """Send every item of `table_frames()`."""


@dataclass(frozen=True, slots=True)
class EpochReady(Event):
    """The epoch is whole and proved: make it permanent, then `acknowledge`. `direct`: its pages are in the image."""

    epoch: int
    term: int
    chain: bytes
    digest: bytes
    level: str
    pages: int
    final: bool
    direct: bool


@dataclass(frozen=True, slots=True)
class VerifyWanted(Event):
    """Hash the image again, then `verified`."""


@dataclass(frozen=True, slots=True)
class HandoverReady(Event):
    """The primary has fenced itself after the final epoch: promote, then `promoted`."""

    epoch: int


class SecondaryState(Enum):
    GREETING = auto()
    DECIDING = auto()
    READY = auto()
    RECEIVING = auto()
    STATED = auto()
    SEALED = auto()
    COMMITTING = auto()
    VERIFYING = auto()
    FINAL = auto()
    PROMOTING = auto()
    CLOSED = auto()


_S = SecondaryState
_OPEN = (_S.READY, _S.RECEIVING, _S.STATED, _S.SEALED, _S.COMMITTING, _S.VERIFYING, _S.FINAL, _S.PROMOTING)
_ENDS = ("BYE", "NACK", "nack", "bye")
_OF_EPOCH = (Type.PAGES, Type.ITERATION, Type.STATE, Type.OUTPUT, Type.COMMIT)
_OF_COMMITTED = (Type.TABLE_REQUEST, Type.VERIFY, Type.HANDOVER)
_ANY_VERSION = (Type.HEARTBEAT, Type.NACK, Type.BYE)  # may have been sent before WELCOME settled it


class SecondaryMachine(Peer):
    """One connection from a primary."""

    TRANSITIONS: ClassVar[Mapping[tuple[Enum, str], Enum]] = {
        (_S.GREETING, "HELLO"): _S.DECIDING,
        (_S.DECIDING, "welcome"): _S.READY,
        (_S.READY, "TABLE_REQUEST"): _S.READY,
        (_S.READY, "VERIFY"): _S.VERIFYING,
        (_S.VERIFYING, "verified"): _S.READY,
        (_S.READY, "PAGES"): _S.RECEIVING,
        (_S.READY, "STATE"): _S.STATED,
        (_S.RECEIVING, "PAGES"): _S.RECEIVING,
        (_S.RECEIVING, "ITERATION"): _S.RECEIVING,
        (_S.RECEIVING, "STATE"): _S.STATED,
        (_S.STATED, "OUTPUT"): _S.SEALED,
        (_S.SEALED, "COMMIT"): _S.COMMITTING,
        (_S.COMMITTING, "acknowledge"): _S.READY,
        (_S.COMMITTING, "acknowledge final"): _S.FINAL,
        (_S.FINAL, "HANDOVER"): _S.PROMOTING,
        (_S.PROMOTING, "promoted"): _S.CLOSED,
        **{(state, "HEARTBEAT"): state for state in (_S.DECIDING, *_OPEN)},
        **{(state, end): _S.CLOSED for state in (_S.GREETING, _S.DECIDING, *_OPEN) for end in _ENDS},
        (_S.CLOSED, "nack"): _S.CLOSED,
        (_S.CLOSED, "bye"): _S.CLOSED,
    }
    BUSY: ClassVar[frozenset[Enum]] = frozenset({_S.DECIDING, _S.COMMITTING, _S.VERIFYING, _S.PROMOTING})

    def __init__(self, timing: Timing, now: int, *, replaying: bool = False) -> None:
        """`replaying`: the frames come from files, so sequence numbers jump and terms may rise between epochs."""
        super().__init__(FrameReader(self._place, check_sequence=not replaying), _S.GREETING, timing, now)
        self._replaying = replaying
        self._collector: Collector | None = None
        self._final = False
        self.pages_received = 0
        self.bytes_received = 0  # in PAGES frames

    # --- what the daemon does

    def welcome(self, holding: Holding) -> Buffers:
        """Go on with this replica, whose table must exist; the primary learns what it holds."""
        self._step("welcome")
        self._collector = Collector(holding)
        holding.term = max(holding.term, self.term)
        message = Welcome(
            self.version, f"ckptd {__version__}", holding.holding, holding.epoch, holding.seed,
            self._collector.table.digest, holding.chain,
        )  # fmt: skip
        return self._send(message, holding.epoch)

    def refuse(self, code: str, text: str, *, epoch: int = 0, term: int = 0) -> Buffers:
        """Say no, and why; `term` is the higher term for `stale_term` and `promoted`."""
        return self._close_with(code, text, epoch, term)

    def replay(self, holding: Holding) -> None:
        """Go straight to READY: the frames of a recording follow."""
        self.state = _S.READY
        self.term = holding.term
        self._collector = Collector(holding, from_files=True)

    def table_frames(self) -> Iterator[Buffers]:
        """The hash of every page, in frames of at most 4 MiB."""
        table, holding = self._epoch.table, self._epoch.holding
        for region in range(len(table.geometry)):
            lanes = table.region(region)
            for first in range(0, len(lanes), TABLE_ROWS):
                part = lanes[first : first + TABLE_ROWS]
                last = region == len(table.geometry) - 1 and first + TABLE_ROWS >= len(lanes)
                yield self._send(Table(region, first, last), holding.epoch, part.reshape(-1).view(np.uint8).data)

    def acknowledge(self, level: str) -> Buffers:
        """The epoch of the last EpochReady is permanent."""
        self._step("acknowledge final" if self._final else "acknowledge")
        return self._send(Ack(level, self._epoch.table.digest), self._epoch.holding.epoch)

    def verified(self, digest: bytes) -> Buffers:
        """The digest of the image's bytes."""
        self._step("verified")
        return self._send(Verified(digest), self._epoch.holding.epoch)

    def promoted(self, term: int) -> Buffers:
        """The guest runs here, in this term."""
        self._step("promoted")
        self.term = term
        return self._send(Promoted(self._epoch.table.digest), self._epoch.holding.epoch)

    def abandon(self) -> None:
        """The connection is gone: the staged epoch is dropped, the table says what the image has. Call it always."""
        if self._collector is not None:
            self._collector.drop()

    @property
    def receiving(self) -> int:
        """The epoch that is being received, or 0."""
        return self._epoch.holding.epoch + 1 if self.state in (_S.RECEIVING, _S.STATED, _S.SEALED) else 0

    # --- what arrives

    def next_event(self) -> Event | None:
        while self.state not in self.BUSY and self.state is not _S.CLOSED:
            frame = self._reader.next_frame()
            if frame is None:
                return None
            event = self._frame_in(frame)
            if event is not None:
                return event
        return None

    def _place(self, header: Header, meta: bytes) -> memoryview:
        """Where this frame's payload goes. All that can be checked without the payload is checked here."""
        if (self.state, header.type.name) not in self.TRANSITIONS:
            self._refuse_frame(header)
        if self.state is not _S.GREETING:
            self._check_place(header)
        if header.type is Type.PAGES:
            self._step("PAGES", header)
            return self._epoch.place(header, meta)
        if header.type in (Type.STATE, Type.OUTPUT):
            return self._epoch.place_blob(header, meta)
        return memoryview(b"")  # no other type that can come here may have a payload

    def _check_place(self, header: Header) -> None:
        committed = self._epoch.holding.epoch
        if self._replaying:
            self.term = max(self.term, header.term)
        elif header.version != self.version and header.type not in _ANY_VERSION:
            raise CorruptFrame(f"version {header.version} after agreeing on {self.version}", field="version")
        if header.term != self.term:
            code = "stale_term" if header.term < self.term else "protocol"
            raise RemoteProtocolError(f"a frame of term {header.term} in term {self.term}", code=code)
        if header.type in _OF_EPOCH and header.epoch != committed + 1:
            raise EpochGap(f"the committed epoch is {committed}", frame=header.type.name, epoch=header.epoch)
        if header.type in _OF_COMMITTED and header.epoch != committed:
            raise EpochGap(f"the committed epoch is {committed}", frame=header.type.name, epoch=header.epoch)

    def _frame_in(self, frame: Frame) -> Event | None:
        header, meta = frame.header, frame.meta
        if header.type is Type.PAGES:  # took its step when its header came
            self.pages_received += self._epoch.pages_in(frame)
            self.bytes_received += header.frame_length
            return None
        self._step(header.type.name, header)
        match header.type:
            case Type.ITERATION:
                self._epoch.iteration_in(header, meta)
            case Type.STATE:
                self._epoch.state_in(frame)
            case Type.OUTPUT:
                self._epoch.output_in(frame)
            case Type.COMMIT:
                return self._commit_in(header, meta)
            case _:
                return self._message_in(header, meta)
        return None

    def _message_in(self, header: Header, meta: bytes) -> Event | None:
        message = decode(header.type, meta)
        match header.type:
            case Type.HELLO:
                return self._hello_in(header, cast(Hello, message))
            case Type.TABLE_REQUEST:
                return TableWanted()
            case Type.VERIFY:
                return VerifyWanted()
            case Type.HANDOVER:
                return HandoverReady(header.epoch)
            case Type.HEARTBEAT:
                return None
            case _:
                return self._heard_out(header, message)

    def _hello_in(self, header: Header, hello: Hello) -> HelloReceived:
        agreed = min(VERSION, hello.newest)
        if agreed < max(OLDEST_VERSION, hello.oldest):
            raise VersionMismatch(
                f"the primary ({hello.software}) speaks protocol versions {hello.oldest} to {hello.newest},"
                f" this secondary {OLDEST_VERSION} to {VERSION}",
                hint="run versions of ckptd that are at most one protocol version apart",
            )
        self.version, self.term = agreed, header.term
        return HelloReceived(hello, header.term)

    def _commit_in(self, header: Header, meta: bytes) -> EpochReady:
        commit = self._epoch.prove(header, meta)
        self._final = commit.final
        return EpochReady(
            header.epoch, header.term, commit.chain, commit.digest, commit.level, commit.pages, commit.final,
            self._epoch.holding.holding == "partial",
        )  # fmt: skip

    @property
    def _epoch(self) -> Collector:
        assert self._collector is not None
        return self._collector
