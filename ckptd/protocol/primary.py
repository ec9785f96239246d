"""The sending machine: epochs out, acknowledgements in.

It frames what the daemon has harvested, keeps the digest chain and the epochs that are not yet acknowledged, and says
what the secondary holds and has made safe. Knows no guest, file, socket or clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import ClassVar

import numpy as np
from crc32c import crc32c

from ckptd import __version__
from ckptd.errors import CorruptFrame, DigestMismatch, LocalProtocolError, RemoteProtocolError
from ckptd.memory.batch import DELTA, Kinds
from ckptd.memory.dirtyset import Gfns
from ckptd.memory.hashing import HASH_SIZE, Hashes
from ckptd.memory.regions import Geometry
from ckptd.protocol.chain import next_chain
from ckptd.protocol.messages import (
    LEVELS,
    Ack,
    Commit,
    Handover,
    Hello,
    Iteration,
    Output,
    Promoted,
    State,
    Table,
    TableRequest,
    Verified,
    Verify,
    Welcome,
    decode,
)  # fmt: skip
from ckptd.protocol.pages import encode_pages
from ckptd.protocol.peer import Buffers, Event, Peer, Timing
from ckptd.protocol.reader import Frame, FrameReader
from ckptd.protocol.wire import OLDEST_VERSION, VERSION, Buffer, Header, Type

__all__ = ["Acknowledged", "PrimaryMachine", "PrimaryState", "PromotedThere", "TablePart", "VerifiedThere", "Welcomed"]


@dataclass(frozen=True, slots=True)
class Welcomed(Event):
    """The secondary goes on with us, and holds this."""

    welcome: Welcome


@dataclass(frozen=True, slots=True)
class TablePart(Event):
    """The hashes, shape (n, 2), that the secondary holds for pages `first` onwards of a region."""

    region: int
    first: int
    hashes: Hashes
    last: bool


@dataclass(frozen=True, slots=True)
class Acknowledged(Event):
    """The epoch is safe at this level."""

    epoch: int
    level: str


@dataclass(frozen=True, slots=True)
class VerifiedThere(Event):
    """The digest of the secondary's image at this epoch, from its bytes."""

    epoch: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class PromotedThere(Event):
    """The guest runs on the secondary now, in this term."""

    epoch: int
    term: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class _Flight:
    epoch: int
    digest: bytes
    level: str


class PrimaryState(Enum):
    START = auto()
    GREETED = auto()
    READY = auto()
    TABLE = auto()
    SENDING = auto()
    STATED = auto()
    SEALED = auto()
    FINAL = auto()
    HANDING_OVER = auto()
    CLOSED = auto()


_P = PrimaryState
_TALKING = (_P.READY, _P.TABLE, _P.SENDING, _P.STATED, _P.SEALED, _P.FINAL, _P.HANDING_OVER)
_EPOCH = (_P.READY, _P.SENDING, _P.STATED, _P.SEALED)
_ENDS = ("NACK", "BYE", "nack", "bye")


class PrimaryMachine(Peer):
    """One connection to a secondary."""

    TRANSITIONS: ClassVar[Mapping[tuple[Enum, str], Enum]] = {
        (_P.START, "hello"): _P.GREETED,
        (_P.GREETED, "WELCOME"): _P.READY,
        (_P.READY, "request_table"): _P.TABLE,
        (_P.TABLE, "TABLE"): _P.TABLE,
        (_P.TABLE, "table complete"): _P.READY,
        (_P.READY, "pages"): _P.SENDING,
        (_P.SENDING, "pages"): _P.SENDING,
        (_P.SENDING, "end_iteration"): _P.SENDING,
        (_P.READY, "save_state"): _P.STATED,
        (_P.SENDING, "save_state"): _P.STATED,
        (_P.STATED, "output"): _P.SEALED,
        (_P.SEALED, "commit"): _P.READY,
        (_P.SEALED, "commit final"): _P.FINAL,
        (_P.READY, "verify"): _P.READY,
        (_P.FINAL, "handover"): _P.HANDING_OVER,
        (_P.HANDING_OVER, "PROMOTED"): _P.CLOSED,
        **{(state, "ACK"): state for state in (*_EPOCH, _P.FINAL)},
        **{(state, "VERIFIED"): state for state in (*_EPOCH, _P.FINAL)},
        **{(state, "HEARTBEAT"): state for state in (_P.GREETED, *_TALKING)},
        **{(state, end): _P.CLOSED for state in (_P.START, _P.GREETED, *_TALKING) for end in _ENDS},
        (_P.CLOSED, "nack"): _P.CLOSED,
        (_P.CLOSED, "bye"): _P.CLOSED,
    }

    def __init__(self, geometry: Geometry, timing: Timing, now: int) -> None:
        super().__init__(FrameReader(self._place), _P.START, timing, now)
        self._geometry = geometry
        self._zero: Hashes = np.zeros(2, dtype=np.uint64)
        self._flights: deque[_Flight] = deque()
        self._welcomed = False
        self._table_at = (0, 0)
        self._verifying = 0
        self._pages = self._iteration_pages = 0
        self._state_crc = self._output_crc = 0
        self.epoch = 0
        self.chain = b""

    # --- what the daemon does

    def hello(self, guest: str, kind: str, run: bytes, seed: int, term: int, level: str, replace: bool) -> Buffers:
        """The first frame: who I am, which guest I protect, in which term."""
        self._step("hello")
        self.term = term
        regions = [[region.name, region.pages] for region in self._geometry]
        return self._send(
            Hello(OLDEST_VERSION, VERSION, f"ckptd {__version__}", guest, kind, run, regions, seed, level, replace), 0
        )

    def request_table(self) -> Buffers:
        """Ask for the hash of every page that the secondary holds; it comes as TableParts."""
        self._step("request_table")
        return self._send(TableRequest(), self.epoch)

    def begin(self, zero: Hashes) -> None:
        """`zero` is the hash of a page of zeros under the pairing's seed; needed before the first `pages`."""
        self._zero = zero

    def pages(self, region: int, gfns: Gfns, hashes: Hashes, kinds: Kinds, iteration: int, payload: Buffers) -> Buffers:
        """1 to 4096 pages with ascending gfns; `payload` holds the raw pages in order, then the delta block, if any."""
        if self.version < 2 and (kinds == DELTA).any():
            raise LocalProtocolError("protocol version 1 has no delta pages", region=self._geometry[region].name)
        self._step("pages")
        meta = encode_pages(region, gfns, hashes, iteration, kinds, self._zero)
        self._pages += len(gfns)
        self._iteration_pages += len(gfns)
        return self._frame(Type.PAGES, meta, self.epoch + 1, *payload)

    def end_iteration(self, iteration: int) -> Buffers:
        """A precopy iteration that sent at least one page has ended."""
        self._step("end_iteration")
        pages, self._iteration_pages = self._iteration_pages, 0
        return self._send(Iteration(iteration, pages), self.epoch + 1)

    def save_state(self, state: Buffer) -> Buffers:
        """The guest's device state as of the pause."""
        self._step("save_state")
        self._state_crc = crc32c(state)
        return self._send(State(self._state_crc), self.epoch + 1, state)

    def output(self, held: Buffer, released: int, mark: int) -> Buffers:
        """All output that the gate holds: what was made after `released`, up to `mark`."""
        self._step("output")
        self._output_crc = crc32c(held)
        return self._send(Output(self._output_crc, released, mark), self.epoch + 1, held)

    def commit(self, digest: bytes, level: str, *, final: bool = False) -> Buffers:
        """The epoch is complete; the image must now have this digest. `epoch` has moved on when this returns."""
        self._step("commit final" if final else "commit")
        self.epoch += 1
        self.chain = next_chain(self.chain, self.epoch, self.term, digest, self._state_crc, self._output_crc)
        self._flights.append(_Flight(self.epoch, digest, level))
        message = Commit(self._pages, digest, self.chain, level, final)
        self._new_epoch()
        return self._send(message, self.epoch)

    def verify(self) -> Buffers:
        """Ask for the digest of the image's bytes as of the epoch that was committed last."""
        self._step("verify")
        self._verifying += 1
        return self._send(Verify(), self.epoch)

    def handover(self) -> Buffers:
        """The final epoch is acknowledged and this side is fenced: promote."""
        if self._flights:
            raise LocalProtocolError("handover before the final epoch is acknowledged", epoch=self.epoch)
        self._step("handover")
        return self._send(Handover(), self.epoch)

    @property
    def unacknowledged(self) -> int:
        """How many committed epochs wait for their ACK."""
        return len(self._flights)

    # --- what arrives

    def next_event(self) -> Event | None:
        while self.state is not _P.CLOSED:
            frame = self._reader.next_frame()
            if frame is None:
                return None
            event = self._frame_in(frame)
            if event is not None:
                return event
        return None

    def _place(self, header: Header, meta: bytes) -> memoryview:
        if (self.state, header.type.name) not in self.TRANSITIONS:  # before a payload is allocated
            self._refuse_frame(header)
        return memoryview(bytearray(header.payload_length))

    def _frame_in(self, frame: Frame) -> Event | None:
        header = frame.header
        self._step(header.type.name, header)
        message = decode(header.type, frame.meta)
        if header.type not in (Type.NACK, Type.BYE):
            if header.type is not Type.PROMOTED and header.term != self.term:
                raise RemoteProtocolError(f"a frame of term {header.term} in term {self.term}", frame=header.type.name)
            if self._welcomed and header.version != self.version:
                raise CorruptFrame(f"version {header.version} after agreeing on {self.version}", field="version")
        match message:
            case Welcome():
                return self._welcome_in(message)
            case Table():
                return self._table_in(header, message, frame.payload)
            case Ack():
                return self._ack_in(header, message)
            case Verified():
                if not self._verifying:
                    raise RemoteProtocolError("VERIFIED without VERIFY", epoch=header.epoch)
                self._verifying -= 1
                return VerifiedThere(header.epoch, message.digest)
            case Promoted():
                if header.term <= self.term:
                    raise RemoteProtocolError(f"promoted in term {header.term}, which is not above {self.term}")
                if header.epoch != self.epoch:
                    raise RemoteProtocolError("another epoch than the final one was promoted", epoch=header.epoch)
                return PromotedThere(header.epoch, header.term, message.digest)
            case _:
                return None if header.type is Type.HEARTBEAT else self._heard_out(header, message)

    def _welcome_in(self, welcome: Welcome) -> Welcomed:
        if not OLDEST_VERSION <= welcome.version <= VERSION:
            raise RemoteProtocolError(f"the secondary chose version {welcome.version}", code="version")
        self.version, self.epoch, self.chain = welcome.version, welcome.epoch, welcome.chain
        self._welcomed = True
        return Welcomed(welcome)

    def _table_in(self, header: Header, table: Table, payload: memoryview) -> TablePart:
        if (table.region, table.first) != self._table_at or len(payload) % HASH_SIZE or not len(payload):
            raise CorruptFrame("a part of the table is missing or misplaced", region=table.region, gfn=table.first)
        region = self._geometry[table.region]
        end = table.first + len(payload) // HASH_SIZE
        if end > region.pages:
            raise CorruptFrame("the table has more pages than the region", region=region.name, gfn=end)
        self._table_at = (table.region, end) if end < region.pages else (table.region + 1, 0)
        if table.last != (self._table_at == (len(self._geometry), 0)):
            raise CorruptFrame("the table ends too early or too late", region=region.name, gfn=end)
        if table.last:
            self._step("table complete", header)
            self._table_at = (0, 0)
        return TablePart(table.region, table.first, np.frombuffer(payload, "<u8").reshape(-1, 2), table.last)

    def _ack_in(self, header: Header, ack: Ack) -> Acknowledged:
        if not self._flights or self._flights[0].epoch != header.epoch:
            due = self._flights[0].epoch if self._flights else "none"
            raise RemoteProtocolError(f"an acknowledgement that is not due; due is {due}", epoch=header.epoch)
        flight = self._flights.popleft()
        if ack.digest != flight.digest:
            ours, theirs = flight.digest.hex(), ack.digest.hex()
            raise DigestMismatch(f"the secondary acknowledged digest {theirs}, ours is {ours}", epoch=header.epoch)
        if LEVELS.index(ack.level) < LEVELS.index(flight.level):
            raise RemoteProtocolError(f"{ack.level} is less than {flight.level}, which was asked", epoch=header.epoch)
        return Acknowledged(header.epoch, ack.level)

    def _new_epoch(self) -> None:
        self._pages = self._iteration_pages = 0
        self._state_crc = self._output_crc = 0
