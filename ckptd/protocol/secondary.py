"""The receiving machine: frames of epochs in, decisions out.

It checks every frame before a byte of it can matter, collects an epoch's pages where `Holding` says (the staged epoch, or the
image itself while no epoch was ever committed), and at COMMIT proves counts, chain and digest. Only then does the daemon hear EpochReady, and
make the epoch permanent. Knows no file, socket or clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from ckptd import __version__
from ckptd.errors import CorruptFrame, DigestMismatch, EpochGap, RemoteProtocolError, VersionMismatch
from ckptd.memory.batch import DELTA, RAW, ZERO, Kinds, expand_delta
from ckptd.memory.digest import HashTable
from ckptd.memory.dirtyset import DirtySet, Gfns
from ckptd.memory.hashing import Hashes, Rows, same
from ckptd.protocol.chain import next_chain
from ckptd.protocol.messages import (
    Ack,
    Commit,
    Hello,
    Iteration,
    Output,
    Promoted,
    State,
    Table,
    Verified,
    Welcome,
    decode,
)  # fmt: skip
from ckptd.protocol.pages import Pages, decode_pages, encode_pages
from ckptd.protocol.peer import Buffers, Event, Peer, Timing, check_crc
from ckptd.protocol.reader import Frame, FrameReader
from ckptd.protocol.wire import OLDEST_VERSION, VERSION, Buffer, Header, Type, pack_frame
from ckptd.units import PAGE_SIZE

__all__ = [
    "EpochReady", "HandoverReady", "HelloReceived", "Holding", "SecondaryMachine", "SecondaryState", "TableWanted",
    "VerifyWanted",
]  # fmt: skip

TABLE_ROWS = 1 << 18  # hashes in one TABLE frame: 4 MiB


class Holding(Protocol):
    """What the machine needs of the replica of one guest."""

    holding: str
    epoch: int
    term: int
    seed: int
    chain: bytes

    @property
    def table(self) -> HashTable | None: ...
    @property
    def images(self) -> Sequence[Rows]: ...
    def place(self, header: Header, meta: bytes) -> memoryview: ...
    def append(self, *buffers: Buffer) -> None: ...
    def drop_staged(self) -> None: ...


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
    """The epoch is whole and proved: make it permanent, then `acknowledge`. `direct`: its pages are in the image already."""

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


class SecondaryMachine(Peer):
    """One connection from a primary."""

    TRANSITIONS = {
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
        **{(state, end): _S.CLOSED for state in (_S.GREETING, _S.DECIDING, *_OPEN) for end in ("BYE", "NACK", "nack", "bye")},
        (_S.CLOSED, "nack"): _S.CLOSED,
        (_S.CLOSED, "bye"): _S.CLOSED,
    }

    def __init__(self, timing: Timing, now: int, *, replaying: bool = False) -> None:
        """`replaying`: the frames come from files, so sequence numbers jump and terms may rise between epochs."""
        super().__init__(FrameReader(self._place, check_sequence=not replaying), _S.GREETING, timing, now)
        self._replaying = replaying
        self._holding: Holding | None = None
        self._scratch = memoryview(b"")
        self._incoming: Pages | None = None
        self._direct = self._staged = self._final = False
        self.pages_received = 0
        self.bytes_received = 0
        self._pages = self._iteration_pages = self._iteration = 0
        self._last = (0, -1)
        self._suspect = DirtySet.empty(0)
        self._changes: list[tuple[int, Gfns, Hashes]] = []
        self._state_crc = self._output_crc = 0

    # --- what the daemon does

    def welcome(self, holding: Holding) -> Buffers:
        """Go on with this replica, whose table must exist; the primary learns what it holds."""
        self._step("welcome")
        self._adopt(holding)
        holding.term = max(holding.term, self.term)
        table = self._table
        return self._send(
            Welcome(
                self.version, f"ckptd {__version__}", holding.holding, holding.epoch, holding.seed, table.digest, holding.chain
            ),
            holding.epoch,
        )  # fmt: skip

    def refuse(self, code: str, text: str, *, epoch: int = 0, term: int = 0) -> Buffers:
        """Say no, and why; `term` is the higher term for `stale_term` and `promoted`."""
        return self._close_with(code, text, epoch, term)

    def replay(self, holding: Holding) -> None:
        """Go straight to READY: the frames of a recording follow."""
        self.state = _S.READY
        self.term = holding.term
        self._adopt(holding)

    def table_frames(self) -> Iterator[Buffers]:
        """The hash of every page, in frames of at most 4 MiB."""
        table, holding = self._table, self._held
        for region in range(len(table.geometry)):
            lanes = table.region(region)
            for first in range(0, len(lanes), TABLE_ROWS):
                part = lanes[first : first + TABLE_ROWS]
                last = region == len(table.geometry) - 1 and first + TABLE_ROWS >= len(lanes)
                yield self._send(Table(region, first, last), holding.epoch, part.reshape(-1).view(np.uint8).data)

    def acknowledge(self, level: str) -> Buffers:
        """The epoch of the last EpochReady is permanent."""
        self._step("acknowledge final" if self._final else "acknowledge")
        return self._send(Ack(level, self._table.digest), self._held.epoch)

    def verified(self, digest: bytes) -> Buffers:
        """The digest of the image's bytes."""
        self._step("verified")
        return self._send(Verified(digest), self._held.epoch)

    def promoted(self, term: int) -> Buffers:
        """The guest runs here, in this term."""
        self._step("promoted")
        self.term = term
        return self._send(Promoted(self._table.digest), self._held.epoch)

    def abandon(self) -> None:
        """The connection is gone: the staged epoch is dropped, the image and its table are as they were."""
        if self._holding is not None:
            self._holding.drop_staged()
            self._new_epoch()

    @property
    def receiving(self) -> int:
        """The epoch that is being received, or 0; and with it how far the resync is: `iteration`."""
        return self._held.epoch + 1 if self.state in (_S.RECEIVING, _S.STATED, _S.SEALED) else 0

    # --- what arrives

    def next_event(self) -> Event | None:
        """The next thing that the daemon must do, or None until more arrives. Raises RemoteProtocolError (close) and ReplicaError."""
        while self.state not in (_S.DECIDING, _S.COMMITTING, _S.VERIFYING, _S.PROMOTING, _S.CLOSED):
            frame = self._reader.next_frame()
            if frame is None:
                return None
            event = self._frame_in(frame)
            if event is not None:
                return event
        return None

    def _frame_in(self, frame: Frame) -> Event | None:
        header = frame.header
        if header.type is not Type.PAGES:  # PAGES took its step when its header came
            self._step(header.type.name, header)
        match header.type:
            case Type.PAGES:
                self._pages_in(frame)
            case Type.HEARTBEAT:
                pass
            case Type.HELLO:
                return self._hello_in(header, cast(Hello, decode(header.type, frame.meta)))
            case Type.TABLE_REQUEST:
                decode(header.type, frame.meta)
                return TableWanted()
            case Type.ITERATION:
                self._iteration_in(header, cast(Iteration, decode(header.type, frame.meta)))
                self._held.append(header.pack(), frame.meta)
            case Type.STATE:
                state = cast(State, decode(header.type, frame.meta))
                check_crc(frame.payload, state.crc, header)
                self._state_crc = state.crc
            case Type.OUTPUT:
                output = cast(Output, decode(header.type, frame.meta))
                check_crc(frame.payload, output.crc, header)
                if output.mark < output.released:
                    raise CorruptFrame("more output was released than was made", epoch=header.epoch, field="released")
                self._output_crc = output.crc
            case Type.COMMIT:
                return self._commit_in(header, frame.meta)
            case Type.VERIFY:
                decode(header.type, frame.meta)
                return VerifyWanted()
            case Type.HANDOVER:
                if header.epoch != self._held.epoch:
                    raise EpochGap("handover of an epoch that is not the committed one", epoch=header.epoch)
                return HandoverReady(header.epoch)
            case Type.NACK | Type.BYE:
                return self._heard_out(header, decode(header.type, frame.meta))
            case _:
                raise RemoteProtocolError(f"a {header.type.name} frame is not for a secondary")
        return None

    def _place(self, header: Header, meta: bytes) -> memoryview:
        """Where this frame's payload goes. Everything about it that can be checked without the payload is checked here."""
        if header.type is Type.HELLO or self.state is _S.GREETING:
            if (self.state, header.type.name) not in self.TRANSITIONS:
                raise RemoteProtocolError(f"a {header.type.name} frame before HELLO")
            return memoryview(bytearray(header.payload_length))
        self._check_place(header)
        if header.type is Type.PAGES:
            return self._place_pages(header, meta)
        if header.type in (Type.STATE, Type.OUTPUT):
            if (self.state, header.type.name) not in self.TRANSITIONS:
                raise RemoteProtocolError(f"a {header.type.name} frame is not allowed here", state=self.state.name)
            return self._held.place(header, meta)
        return memoryview(bytearray(header.payload_length))

    def _check_place(self, header: Header) -> None:
        if header.version != self.version and not self._replaying:
            raise CorruptFrame(f"version {header.version} after agreeing on {self.version}", field="version")
        if self._replaying and header.term > self.term:
            self.term = header.term
        if header.term != self.term:
            code = "stale_term" if header.term < self.term else "protocol"
            raise RemoteProtocolError(f"a frame of term {header.term} in term {self.term}", code=code)
        if header.type in _OF_EPOCH and header.epoch != self._held.epoch + 1:
            raise EpochGap(
                f"a frame of epoch {header.epoch} while epoch {self._held.epoch} is the committed one",
                frame=header.type.name,
            )

    def _place_pages(self, header: Header, meta: bytes) -> memoryview:
        self._step("PAGES", header)
        pages = decode_pages(header, meta, self._table.geometry, self._table.hasher)
        first = (pages.region, int(pages.gfns[0]))
        if self._iteration_of(pages) != self._iteration:
            if self._iteration_of(pages) < self._iteration:
                raise CorruptFrame("a page of an iteration that has ended", frame="PAGES", epoch=header.epoch)
            self._iteration, self._iteration_pages, self._last = self._iteration_of(pages), 0, (0, -1)
        if first <= self._last:
            name = self._table.geometry[pages.region].name
            raise CorruptFrame("a page is named twice or out of order", region=name, gfn=first[1], epoch=header.epoch)
        self._last = (pages.region, int(pages.gfns[-1]))
        self._incoming = pages
        self._direct = self._held.holding == "partial"
        if self._direct and pages.contiguous:
            rows = self._held.images[pages.region][first[1] : first[1] + len(pages.gfns)]
            return rows.reshape(-1).data
        self._staged = not (self._direct or pages.iteration or (pages.kinds == DELTA).any())
        if self._staged:
            return self._held.place(header, meta)
        if len(self._scratch) < header.payload_length:
            self._scratch = memoryview(bytearray(header.payload_length))
        return self._scratch[: header.payload_length]

    def _pages_in(self, frame: Frame) -> None:
        pages, table = self._incoming, self._table
        assert pages is not None
        self._incoming = None
        raw = frame.payload[: pages.raw * PAGE_SIZE]
        rows = np.frombuffer(raw, dtype=np.uint8).reshape(-1, PAGE_SIZE)
        if len(raw) < len(frame.payload):
            rows = self._expand(pages, rows, frame.payload[len(raw) :])
        kinds = np.minimum(pages.kinds, RAW)  # from here on a delta page is a raw one
        sent = kinds == RAW
        hashes = pages.hashes.copy()
        hashes[sent] = table.hasher.hash_rows(rows)
        torn = ~same(hashes, pages.hashes)
        if torn.any() and not pages.iteration:
            raise CorruptFrame(
                "a page is not what its hash says", region=table.geometry[pages.region].name,
                gfn=int(pages.gfns[int(np.argmax(torn))]), epoch=frame.header.epoch,
            )  # fmt: skip
        self._suspect_in(pages, torn)
        if self._direct:
            self._write(pages, kinds, rows)
            table.update(pages.region, pages.gfns, hashes)
        else:
            self._changes.append((pages.region, pages.gfns, hashes))
            if not self._staged:
                self._append_raw(frame.header, pages, hashes, rows)
        self._pages += len(pages.gfns)
        self._iteration_pages += len(pages.gfns)
        self.pages_received += len(pages.gfns)
        self.bytes_received += frame.header.frame_length

    def _expand(self, pages: Pages, raw: Rows, block: memoryview) -> Rows:
        """All pages that carry bytes, raw and delta, in gfn order."""
        kinds = pages.kinds[pages.kinds != ZERO]
        delta = pages.gfns[pages.kinds == DELTA]
        rows = np.empty((len(kinds), PAGE_SIZE), dtype=np.uint8)
        rows[kinds == RAW] = raw
        rows[kinds == DELTA] = expand_delta(block, len(delta)) ^ self._held.images[pages.region][delta]
        return rows

    def _write(self, pages: Pages, kinds: Kinds, rows: Rows) -> None:
        """Into the image, where no committed epoch is at stake; pages of zeros are not touched if they are zero already."""
        image, table = self._held.images[pages.region], self._table
        if not pages.contiguous:
            image[pages.gfns[kinds == RAW]] = rows
        zero = pages.gfns[kinds == ZERO]
        held = table.lookup(pages.region, zero)
        image[zero[~table.hasher.is_zero(held)]] = 0

    def _append_raw(self, header: Header, pages: Pages, hashes: Hashes, rows: Rows) -> None:
        """Stage an equivalent frame whose hashes are those of its bytes and whose pages need no other copy to be read."""
        zero = self._table.hasher.zero
        kinds = np.where(same(hashes, zero), np.uint8(ZERO), np.uint8(RAW))
        if np.count_nonzero(kinds == RAW) != len(rows):  # a torn page of zeros: it will come again, keep the frame simple
            rows = rows[~same(self._table.hasher.hash_rows(rows), zero)]
        meta = encode_pages(pages.region, pages.gfns, hashes, pages.iteration, kinds, zero)
        head = pack_frame(
            Type.PAGES, meta, rows.nbytes, term=header.term, epoch=header.epoch, sequence=header.sequence
        )
        self._held.append(head, rows.reshape(-1).data)

    def _suspect_in(self, pages: Pages, torn: npt.NDArray[np.bool_]) -> None:
        """A torn page must come again before COMMIT."""
        if not torn.any() and not self._suspect:
            return
        mine: list[Gfns] = [np.empty(0, dtype=np.int64)] * len(self._table.geometry)
        mine[pages.region] = pages.gfns
        bad = list(mine)
        bad[pages.region] = pages.gfns[torn]
        self._suspect = self._suspect.subtract(DirtySet(mine)).merge(DirtySet(bad))

    def _iteration_in(self, header: Header, message: Iteration) -> None:
        if message.iteration != self._iteration or message.pages != self._iteration_pages:
            raise CorruptFrame(
                f"iteration {self._iteration} had {self._iteration_pages} pages;"
                f" its end says {message.pages} in {message.iteration}", epoch=header.epoch,
            )  # fmt: skip
        self._last = (len(self._table.geometry), 0)  # nothing more belongs to this iteration

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
        commit, holding, table = cast(Commit, decode(header.type, meta)), self._held, self._table
        if commit.pages != self._pages:
            raise EpochGap(f"{self._pages} pages of the epoch arrived; its commit says {commit.pages}", epoch=header.epoch)
        if self._suspect:
            region = next(index for index, gfns in enumerate(self._suspect.gfns) if len(gfns))
            raise RemoteProtocolError(
                "a page changed while it was being sent and was never sent whole", code="torn", epoch=header.epoch,
                region=table.geometry[region].name, gfn=int(self._suspect.gfns[region][0]),
            )  # fmt: skip
        expected = next_chain(holding.chain, header.epoch, header.term, commit.digest, self._state_crc, self._output_crc)
        if commit.chain != expected:
            raise EpochGap("the digest chain does not follow: an epoch was lost, repeated or exchanged", epoch=header.epoch)
        before = [(region, gfns, table.update(region, gfns, hashes)) for region, gfns, hashes in self._changes]
        if table.digest != commit.digest:
            stated, found = commit.digest.hex(), table.digest.hex()
            for region, gfns, hashes in reversed(before):
                table.update(region, gfns, hashes)
            raise DigestMismatch(f"the image would have digest {found}; the commit says {stated}", epoch=header.epoch)
        holding.append(header.pack(), meta)
        event = EpochReady(
            header.epoch, header.term, commit.chain, commit.digest, commit.level, self._pages, commit.final,
            holding.holding == "partial",
        )  # fmt: skip
        self._final = commit.final
        self._new_epoch()
        return event

    # --- small things

    def _adopt(self, holding: Holding) -> None:
        self._holding = holding
        self._new_epoch()

    def _new_epoch(self) -> None:
        self._pages = self._iteration_pages = self._iteration = 0
        self._last = (0, -1)
        self._suspect = DirtySet.empty(len(self._table.geometry))
        self._changes = []
        self._state_crc = self._output_crc = 0

    @staticmethod
    def _iteration_of(pages: Pages) -> int:
        """Paused pages, iteration 0 on the wire, come after every precopy iteration."""
        return pages.iteration or 1 << 33

    @property
    def _held(self) -> Holding:
        assert self._holding is not None
        return self._holding

    @property
    def _table(self) -> HashTable:
        table = self._held.table
        assert table is not None
        return table


_OF_EPOCH = (Type.PAGES, Type.ITERATION, Type.STATE, Type.OUTPUT, Type.COMMIT)
