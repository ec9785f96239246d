"""The receiving half of an epoch: collects its frames where `Holding` says, and proves it at COMMIT.

Pages go into the staged epoch, or into the image itself while no epoch was ever committed ("partial"): there is
nothing to protect yet, and the first image is large. Every page is hashed on arrival. A page that was copied from a
paused guest must be what its hash says; a page of a precopy iteration may be torn, and must then come again before
COMMIT. The table of hashes moves on only with a proof, and moves back when the proven epoch could not be made
permanent. Knows no connection, state machine or file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from ckptd.errors import CorruptFrame, DigestMismatch, EpochGap, RemoteProtocolError
from ckptd.memory.batch import DELTA, RAW, ZERO, Kinds, expand_delta
from ckptd.memory.digest import HashTable
from ckptd.memory.dirtyset import DirtySet, Gfns
from ckptd.memory.hashing import Hashes, Rows, same
from ckptd.protocol.chain import next_chain
from ckptd.protocol.messages import Commit, Iteration, Output, State, decode
from ckptd.protocol.pages import Pages, decode_pages, encode_pages
from ckptd.protocol.peer import check_crc
from ckptd.protocol.reader import Frame
from ckptd.protocol.wire import Buffer, Header, Type, pack_frame
from ckptd.units import PAGE_SIZE

__all__ = ["Collector", "Holding"]

_PAUSED = 1 << 33  # pages of the paused guest, iteration 0 on the wire, come after every precopy iteration


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


class Collector:
    """The epoch that follows the committed one of `holding`, frame by frame; then the next."""

    def __init__(self, holding: Holding, *, from_files: bool = False) -> None:
        """`from_files`: nobody writes to the pages any more, so one that is not its hash is damaged, not torn."""
        self.holding = holding
        self._from_files = from_files
        self._scratch = memoryview(b"")
        self._incoming: Pages | None = None
        self._direct = self._staged = False
        self._undo: list[tuple[int, Gfns, Hashes]] = []
        self._proved = 0
        self._begin()

    def _begin(self) -> None:
        self._pages = self._iteration_pages = self._iteration = 0
        self._ended = False  # the iteration's ITERATION has come
        self._last = (0, -1)
        self._suspect = DirtySet.empty(len(self.table.geometry))
        self._changes: list[tuple[int, Gfns, Hashes]] = []
        self._state_crc = self._output_crc = 0

    @property
    def table(self) -> HashTable:
        """The hashes of the committed image; from a proof on, those of the proven one."""
        table = self.holding.table
        assert table is not None
        return table

    # --- pages

    def place(self, header: Header, meta: bytes) -> memoryview:
        """Where the payload of this PAGES frame goes. All that can be checked without the payload is checked here."""
        pages = decode_pages(header, meta, self.table.geometry, self.table.hasher)
        self._in_order(pages, header)
        self._incoming = pages
        self._direct = self.holding.holding == "partial"
        if self._direct and pages.contiguous:
            first = int(pages.gfns[0])
            return self.holding.images[pages.region][first : first + len(pages.gfns)].reshape(-1).data
        self._staged = not (self._direct or pages.iteration or (pages.kinds == DELTA).any())
        if self._staged:
            return self.holding.place(header, meta)
        if len(self._scratch) < header.payload_length:
            self._scratch = memoryview(bytearray(header.payload_length))
        return self._scratch[: header.payload_length]

    def _in_order(self, pages: Pages, header: Header) -> None:
        """Iterations rise and end before the next thing begins; pages ascend within one."""
        iteration = pages.iteration or _PAUSED
        name, gfn = self.table.geometry[pages.region].name, int(pages.gfns[0])
        if iteration != self._iteration:
            if iteration < self._iteration:
                raise CorruptFrame("a page of an iteration that is over", region=name, gfn=gfn, epoch=header.epoch)
            self._must_have_ended(header)
            self._iteration, self._iteration_pages, self._ended, self._last = iteration, 0, False, (0, -1)
        elif self._ended:
            raise CorruptFrame("a page of an iteration that has ended", region=name, gfn=gfn, epoch=header.epoch)
        if (pages.region, gfn) <= self._last:
            raise CorruptFrame("a page is named twice or out of order", region=name, gfn=gfn, epoch=header.epoch)
        self._last = (pages.region, int(pages.gfns[-1]))

    def _must_have_ended(self, header: Header) -> None:
        if 0 < self._iteration < _PAUSED and not self._ended:
            raise CorruptFrame(f"iteration {self._iteration} has not ended", frame=header.type.name, epoch=header.epoch)

    def pages_in(self, frame: Frame) -> int:
        """The payload has come. Returns the number of pages."""
        pages, table = self._incoming, self.table
        assert pages is not None
        raw = frame.payload[: pages.raw * PAGE_SIZE]
        rows = np.frombuffer(raw, dtype=np.uint8).reshape(-1, PAGE_SIZE)
        if len(raw) < len(frame.payload):
            rows = self._expand(pages, rows, frame.payload[len(raw) :])
        kinds = np.minimum(pages.kinds, RAW)  # from here on a delta page is a raw one
        sent = kinds == RAW
        hashes = pages.hashes.copy()
        hashes[sent] = table.hasher.hash_rows(rows)
        torn = ~same(hashes, pages.hashes)
        if torn.any() and (self._from_files or not pages.iteration):
            raise CorruptFrame(
                "a page is not what its hash says", region=table.geometry[pages.region].name,
                gfn=int(pages.gfns[int(np.argmax(torn))]), epoch=frame.header.epoch,
            )  # fmt: skip
        self._incoming = None
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
        return len(pages.gfns)

    def _expand(self, pages: Pages, raw: Rows, block: memoryview) -> Rows:
        """All pages that carry bytes, raw and delta, in gfn order."""
        kinds = pages.kinds[pages.kinds != ZERO]
        delta = pages.gfns[pages.kinds == DELTA]
        rows = np.empty((len(kinds), PAGE_SIZE), dtype=np.uint8)
        rows[kinds == RAW] = raw
        rows[kinds == DELTA] = expand_delta(block, len(delta)) ^ self.holding.images[pages.region][delta]
        return rows

    def _write(self, pages: Pages, kinds: Kinds, rows: Rows) -> None:
        """Into the image, where no epoch is at stake; pages of zeros are not touched if they are zero already."""
        image, table = self.holding.images[pages.region], self.table
        if not pages.contiguous:
            image[pages.gfns[kinds == RAW]] = rows
        zero = pages.gfns[kinds == ZERO]
        held = table.lookup(pages.region, zero)
        image[zero[~table.hasher.is_zero(held)]] = 0

    def _append_raw(self, header: Header, pages: Pages, hashes: Hashes, rows: Rows) -> None:
        """Stage an equivalent frame: its hashes are those of its bytes, and its pages need no other copy to be read."""
        zero = self.table.hasher.zero
        kinds = np.where(same(hashes, zero), np.uint8(ZERO), np.uint8(RAW))
        if np.count_nonzero(kinds == RAW) != len(rows):  # torn into a page of zeros: it will come again
            rows = rows[~same(self.table.hasher.hash_rows(rows), zero)]
        meta = encode_pages(pages.region, pages.gfns, hashes, pages.iteration, kinds, zero)
        head = pack_frame(Type.PAGES, meta, rows.nbytes, term=header.term, epoch=header.epoch, sequence=header.sequence)
        self.holding.append(head, rows.reshape(-1).data)

    def _suspect_in(self, pages: Pages, torn: npt.NDArray[np.bool_]) -> None:
        """A torn page must come again before COMMIT."""
        if not torn.any() and not self._suspect:
            return
        mine: list[Gfns] = [np.empty(0, dtype=np.int64)] * len(self.table.geometry)
        mine[pages.region] = pages.gfns
        bad = list(mine)
        bad[pages.region] = pages.gfns[torn]
        self._suspect = self._suspect.subtract(DirtySet(mine)).merge(DirtySet(bad))

    # --- the rest of an epoch

    def iteration_in(self, header: Header, meta: bytes) -> None:
        """A precopy iteration is over."""
        message = cast(Iteration, decode(header.type, meta))
        if self._ended or message.iteration != self._iteration or message.pages != self._iteration_pages:
            raise CorruptFrame(
                f"iteration {self._iteration} had {self._iteration_pages} pages;"
                f" its end says {message.pages} in {message.iteration}", epoch=header.epoch,
            )  # fmt: skip
        self._ended = True
        self.holding.append(header.pack(), meta)

    def place_blob(self, header: Header, meta: bytes) -> memoryview:
        """Where the payload of STATE or OUTPUT goes."""
        self._must_have_ended(header)
        message = decode(header.type, meta)
        if isinstance(message, Output) and message.mark < message.released:
            raise CorruptFrame("more output was released than was made", epoch=header.epoch, field="released")
        return self.holding.place(header, meta)

    def state_in(self, frame: Frame) -> None:
        state = cast(State, decode(frame.header.type, frame.meta))
        check_crc(frame.payload, state.crc, frame.header)
        self._state_crc = state.crc

    def output_in(self, frame: Frame) -> None:
        output = cast(Output, decode(frame.header.type, frame.meta))
        check_crc(frame.payload, output.crc, frame.header)
        self._output_crc = output.crc

    # --- the proof

    def prove(self, header: Header, meta: bytes) -> Commit:
        """COMMIT has come: count, chain and digest must be right. The table is then that of the new image."""
        commit, holding, table = cast(Commit, decode(header.type, meta)), self.holding, self.table
        if commit.pages != self._pages:
            raise EpochGap(
                f"{self._pages} pages of the epoch arrived; its commit says {commit.pages}", epoch=header.epoch
            )
        if self._suspect:
            region = next(index for index, gfns in enumerate(self._suspect.gfns) if len(gfns))
            raise RemoteProtocolError(
                "a page changed while it was being sent and was never sent whole", code="torn", epoch=header.epoch,
                region=table.geometry[region].name, gfn=int(self._suspect.gfns[region][0]),
            )  # fmt: skip
        crcs = self._state_crc, self._output_crc
        if commit.chain != next_chain(holding.chain, header.epoch, header.term, commit.digest, *crcs):
            raise EpochGap(
                "the digest chain does not follow: an epoch was lost, repeated or exchanged", epoch=header.epoch
            )
        self._undo = [(region, gfns, table.update(region, gfns, hashes)) for region, gfns, hashes in self._changes]
        self._proved = header.epoch
        if table.digest != commit.digest:
            stated, found = commit.digest.hex(), table.digest.hex()
            self._take_back()
            raise DigestMismatch(f"the image would have digest {found}; the commit says {stated}", epoch=header.epoch)
        holding.append(header.pack(), meta)
        self._begin()
        return commit

    def _take_back(self) -> None:
        for region, gfns, hashes in reversed(self._undo):
            self.table.update(region, gfns, hashes)
        self._undo = []

    def drop(self) -> None:
        """Nothing more of this epoch will come: the table is again that of the image."""
        if self._proved > self.holding.epoch:  # proven, but not made permanent
            self._take_back()
        if self._incoming is not None and self._direct and self._incoming.contiguous:
            # Part of the payload may be in the image: what is there now is what the table has to say.
            region, gfns = self._incoming.region, self._incoming.gfns
            self.table.update(region, gfns, self.table.hasher.hash_rows(self.holding.images[region][gfns]))
        self._incoming = None
        self.holding.drop_staged()
        self._begin()
