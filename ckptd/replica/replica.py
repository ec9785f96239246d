"""The replica of one guest: its image, which is exactly one committed epoch, the staged epoch, and what is retained.

An epoch is staged (`place`, `append`), made permanent (`commit`), acknowledged by the caller, and applied to the
image (`apply`). The staged epoch is the redo log of its own application. Order of every step, so that a process may
die between any two:

    commit   [durable: fdatasync the staged file] · rename it to epoch-N.seg · [durable: fsync the directory] apply
    write undo.new · rename it to epoch-N.undo · scatter the pages · meta says epoch N · recycle what history lets go

Commit, apply, promote and restore exclude each other by a lock and may run in any thread; `place` and `append` may go
on meanwhile. Knows no connection and no peer.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ckptd.errors import EpochGap, Fenced, Inconsistent, JournalError, NoSpace, ReplicaError, StateError
from ckptd.memory.digest import HashTable
from ckptd.memory.hashing import PageHasher, Rows
from ckptd.memory.regions import Geometry
from ckptd.protocol.chain import CHAIN_START
from ckptd.protocol.wire import Buffer, Header
from ckptd.replica.applier import Applier
from ckptd.replica.files import Lock, boot_id, saying, sync_directory
from ckptd.replica.image import Image
from ckptd.replica.journal import HistoryEntry, Journal
from ckptd.replica.meta import Meta, MetaFile
from ckptd.replica.recovery import recover
from ckptd.replica.segment import EpochRecord, Segment, read_epoch, read_frames
from ckptd.units import format_size

__all__ = ["Replica"]


class Replica:
    """What the secondary holds of one guest. Make it with `open`."""

    holding: str
    geometry: Geometry | None
    table: HashTable | None = None
    hook: Callable[[str], None] = staticmethod(lambda point: None)  # named points at which tests let a process die
    _term: int

    def __init__(self, directory: Path, lock: Lock, meta: MetaFile, journal: Journal, max_memory: int | None) -> None:
        self.directory = directory
        self.guest = meta.meta.guest
        self.reason = ""
        self._lock_file, self._meta, self._journal, self._max_memory = lock, meta, journal, max_memory
        self._lock = threading.RLock()
        self._staged: Segment | None = None
        self._pending: deque[EpochRecord] = deque()
        self._applier: Applier | None = None
        self.images: list[Rows] = []
        self._adopt(meta.meta, None)

    @classmethod
    def open(
        cls, directory: Path, *, guest: str, history: int, history_bytes: int, reserve: int,
        max_memory: int | None = None,
    ) -> Replica:  # fmt: skip
        """The replica in `directory`, made if need be, recovered if need be.

        Raises StateError (another process has it, or it is of another guest), NoSpace, Inconsistent (nothing can be
        read). An image that is no committed epoch is no error here: `holding` is then "partial" and `reason` says
        why.
        """
        with saying("make the replica's directory", directory):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = Lock(directory / "lock")
        to_close: list[MetaFile | Journal | Lock] = [lock]
        try:
            meta = MetaFile.open(directory / "meta", Meta("empty", guest, boot_id()))
            to_close.append(meta)
            if meta.meta.guest != guest:
                raise StateError(f"the replica is of guest {meta.meta.guest!r}, not of {guest!r}", file=directory)
            journal = Journal(directory, history, history_bytes, reserve)
            to_close.append(journal)
            journal.load()
            self = cls(directory, lock, meta, journal, max_memory)
            self._recover()
        except BaseException:
            for one in reversed(to_close):
                one.close()
            raise
        return self

    # --- making and giving up

    def create(self, *, kind: str, geometry: Geometry, seed: int, run: bytes, term: int) -> None:
        """empty -> partial: allocate everything, an image of zeros. Raises NoSpace and stays empty; StateError."""
        with self._lock:
            if self.holding != "empty":
                raise StateError(f"the replica is {self.holding}, not empty", guest=self.guest)
            if self._max_memory is not None and geometry.size_bytes > self._max_memory:
                raise NoSpace(
                    f"the guest has {format_size(geometry.size_bytes)} of memory; this secondary takes at most"
                    f" {format_size(self._max_memory)}", hint="raise replica.max_memory", guest=self.guest,
                )  # fmt: skip
            image = Image(self.directory, geometry, create=True)
            try:
                self._staged = self._staged or self._journal.stage()
                self.hook("create: allocated")
                regions = tuple((region.name, region.pages) for region in geometry)
                meta = Meta("partial", self.guest, boot_id(), kind, run, regions, seed, max(term, self.term))
                self._meta.write_durably(meta)
            except BaseException:
                image.close()
                image.unlink()
                if self._staged is not None:
                    self._staged.unlink()
                    self._staged = None
                raise
            self._start(image, PageHasher(seed))
            self.table = HashTable(geometry, PageHasher(seed))
            self._adopt(meta, None)

    def discard(self) -> None:
        """Back to empty; the term is kept. The image's files are gone."""
        if self._applier is not None:
            self._applier.wait()
        with self._lock:
            self._meta.write_durably(Meta("empty", self.guest, boot_id(), term=self.term))
            self.hook("discard: written")
            self.drop_staged()
            self._empty()

    def close(self) -> None:
        """Let go of files and lock; what is staged is dropped by the next opener."""
        if self._applier is not None:
            self._applier.wait()
        with self._lock:
            if self._staged is not None:
                self._staged.forget()
            self._staged = None
            self._pending.clear()
            self._journal.close()
            self._stop()
            self._meta.close()
            self._lock_file.close()

    # --- the term

    @property
    def term(self) -> int:
        """The highest term that was ever seen here; a higher one is on stable storage before it counts."""
        return self._term

    @term.setter
    def term(self, term: int) -> None:
        if term > self._term:
            with self._lock:
                self._meta.write_durably(replace(self._meta.meta, term=term))
                self._term = term

    # --- staging

    def place(self, header: Header, meta: bytes) -> memoryview:
        """Append header and meta to the staged epoch; returns where the payload must be written. Raises NoSpace."""
        head = header.pack() + meta
        try:
            return self._stage().place(head, header.payload_length)
        except NoSpace:
            self._give_way()
            return self._stage().place(head, header.payload_length)

    def append(self, *buffers: Buffer) -> None:
        """Append whole frames. Raises NoSpace."""
        try:
            self._stage().append(*buffers)
        except NoSpace:
            self._give_way()
            self._stage().append(*buffers)

    def drop_staged(self) -> None:
        """Forget the staged epoch."""
        staged, self._staged = self._staged, None
        if staged is not None:
            self._journal.recycle(staged)

    def make_room(self) -> None:
        """Have a segment for the next epoch allocated, so that its first frame need not wait. Raises NoSpace."""
        self._stage()

    def staged_frames(self) -> Iterator[tuple[Header, bytes, memoryview]]:
        """The frames that are staged so far."""
        if self._staged is not None:
            for frame in read_frames(self._staged.view, used=self._staged.used):
                yield frame.header, frame.meta, frame.payload

    def _give_way(self) -> None:
        """The file system is full: history gives way before the guest's protection does."""
        with self._lock:
            self._journal.make_room()
            if self._applier is not None and self.holding == "committed":
                self._applier.give_way()

    def _stage(self) -> Segment:
        if self._staged is None:
            if self.holding not in ("partial", "committed"):
                raise StateError(f"nothing can be staged for a replica that is {self.holding}", guest=self.guest)
            self._staged = self._journal.stage()
        return self._staged

    def rehash(self) -> None:
        """Make the table that of the image's bytes."""
        if self.table is not None:
            self.table.rehash(self.images)

    # --- commit and apply

    def commit(self, epoch: int, term: int, chain: bytes, digest: bytes, level: str) -> None:
        """Make the staged epoch permanent; the caller acknowledges it once this returns.

        Level "memory": lasts through the death of this process. "durable": and through a power loss. Raises EpochGap,
        StateError, JournalError (the staged frames are not that epoch), ReplicaError (stable storage failed: the
        epoch must not be acknowledged).
        """
        with self._lock:
            staged, geometry, table = self._staged, self.geometry, self.table
            open_ = self.holding in ("partial", "committed")
            if not open_ or staged is None or not staged.used or geometry is None or table is None:
                raise StateError("there is no staged epoch to commit", epoch=epoch, holding=self.holding)
            if epoch != self.epoch + 1:
                raise EpochGap(f"epoch {epoch} cannot follow epoch {self.epoch}", guest=self.guest)
            record = read_epoch(staged.view[: staged.used], epoch, geometry, table.hasher, check=False)
            found = (record.term, record.commit.chain, record.commit.digest, record.used)
            if found != (term, chain, digest, staged.used):
                raise JournalError("the staged frames are not those of the epoch to commit", epoch=epoch)
            direct, durable = self.holding == "partial", level == "durable"
            if direct:
                self._commit_direct(record, staged, durable)
            else:
                self._commit_staged(record, staged, durable)
            self._adopt_record(record)

    def apply(self) -> None:
        """Bring the image up to the last committed epoch; undo first. The epoch is safe whatever this raises."""
        if self._applier is not None:
            self._apply_pending(self._applier)
            self._applier.settle_if_due()

    def distrust(self, reason: str) -> None:
        """committed -> partial: the image is not what was committed, and must not be promoted (P2). Rehash, resync."""
        with self._lock:
            if self.holding != "committed":
                return
            self._meta.write_durably(replace(self._meta.meta, holding="partial", reason=reason))
            self.holding, self.reason = "partial", reason

    def settle(self) -> None:
        """Write the image to stable storage now; at level durable it happens by itself, too. Raises ReplicaError."""
        if self._applier is not None and self.holding == "committed":
            self._applier.settle()

    def promote(self, term: int) -> None:
        """committed -> promoted: the guest may run over the image now. Raises Inconsistent, Fenced and StateError."""
        with self._lock:
            if self.holding == "promoted":
                raise StateError("the replica is promoted already", guest=self.guest, term=self.term)
            if self.holding != "committed":
                raise Inconsistent(
                    f"the replica is {self.holding}, no committed epoch" + (f": {self.reason}" if self.reason else ""),
                    hint="let the primary resynchronise it, or start the guest anew", guest=self.guest,
                )  # fmt: skip
            if term <= self.term:
                raise Fenced(f"a promotion needs a term above {self.term}", guest=self.guest, term=term)
            if self._applier is not None:
                self._apply_pending(self._applier)
            self.drop_staged()
            self._meta.write_durably(replace(self._meta.meta, holding="promoted", term=term))
            self._term, self.holding = term, "promoted"

    # --- history

    def history(self) -> list[HistoryEntry]:
        """The epochs that can be restored, oldest first, the committed one last."""
        with self._lock:
            if self.holding != "committed":
                return []
            return [self._journal.entry(epoch) for epoch in range(self._meta.meta.first, self._meta.meta.epoch + 1)]

    @contextmanager
    def pinned(self, epoch: int) -> Iterator[Journal]:
        """Keep this retained epoch and all newer ones while the block runs. Raises StateError if it is not retained."""
        with self._lock:
            retained = [entry.epoch for entry in self.history()]
            if epoch not in retained:
                kept = f"{retained[0]} to {retained[-1]} are" if retained else "none is"
                raise StateError(f"epoch {epoch} is not retained: {kept}", guest=self.guest)
            self._journal.pins.append(epoch)
        try:
            yield self._journal
        finally:
            with self._lock:
                self._journal.pins.remove(epoch)

    def applied(self) -> int:
        """The epoch that the image is at; waits for an apply that runs."""
        with self._lock:
            return self._meta.meta.epoch

    def undo_of(self, epoch: int) -> Segment | None:
        with self._lock:
            return self._journal.undos.get(epoch)

    @property
    def direct_epoch(self) -> int:
        """The epoch whose pages went straight into the image: its segment holds none of them."""
        return self._meta.meta.direct

    def chain_before(self, epoch: int) -> bytes:
        """The chain that a retained epoch continues."""
        with self._lock:
            if epoch == self._meta.meta.first:
                return self._meta.meta.first_chain
            return self._journal.entry(epoch - 1).chain or CHAIN_START

    def keep(self, history: int, history_bytes: int) -> None:
        """New limits of history; they count from the next applied epoch on."""
        with self._lock:
            self._journal.history, self._journal.history_bytes = history, history_bytes

    def descriptors(self) -> list[int]:
        """The open image files, one for each region, for a guest that is to run over them. They stay the replica's."""
        return list(self._applier.image.fds) if self._applier is not None else []

    # --- inside

    def _apply_pending(self, applier: Applier) -> None:
        with self._lock:
            while self._pending:
                applier.apply(self._pending[0], self._term)
                self._pending.popleft()

    def _commit_direct(self, record: EpochRecord, staged: Segment, durable: bool) -> None:
        """The first epoch: its pages are in the image. The meta file commits it."""
        applier, table = self._applier, self.table
        assert applier is not None and table is not None
        for pages, payload in record.pages:
            applier.image.scatter(pages, payload)
        if durable:
            applier.sync()
            self._sync_staged(staged)
        self._journal.clear()
        self._seal(record, staged, durable)
        self.hook("commit: named")
        synced, epoch = record.epoch if durable else 0, record.epoch
        self._meta.write_durably(
            replace(
                self._meta.meta, holding="committed", epoch=epoch, first=epoch, first_chain=self.chain, direct=epoch,
                synced=synced, chain=record.commit.chain, before=self.chain, digest=record.commit.digest, reason="",
                term=max(self._term, record.term), boot=boot_id(),
            )
        )  # fmt: skip
        self.hook("commit: written")
        applier.secured = durable
        applier.know(table)
        self.holding, self.reason = "committed", ""

    def _commit_staged(self, record: EpochRecord, staged: Segment, durable: bool) -> None:
        applier = self._applier
        assert applier is not None
        if durable and not applier.secured:  # epochs before this one may be nowhere but in memory
            applier.settle()
            for epoch in range(self._meta.meta.epoch + 1, record.epoch):
                self._journal.segments[epoch].sync()
        if durable:
            self._sync_staged(staged)
        self.hook("commit: synced")
        self._seal(record, staged, durable)
        self.hook("commit: named")
        applier.secured = durable
        self._pending.append(record)

    def _sync_staged(self, staged: Segment) -> None:
        try:
            staged.sync()
        except ReplicaError:
            self._staged = None
            staged.unlink()  # the file is suspect, and so is what a second attempt would say of it
            raise

    def _seal(self, record: EpochRecord, staged: Segment, durable: bool) -> None:
        """The staged file becomes epoch-N.seg."""
        commit = record.commit
        entry = HistoryEntry(
            record.epoch, record.term, commit.pages, record.used, time.time_ns(), commit.digest, commit.chain
        )
        self._staged = None
        self._journal.add(staged, entry)
        if durable:
            sync_directory(self.directory)
        staged.settle()

    def _recover(self) -> None:
        meta = self._meta.meta
        if meta.holding == "empty":
            self._empty()
            return
        found = recover(self.directory, meta, self._journal, boot_id(), self.hook)
        self._start(found.image, PageHasher(meta.seed))
        self.table = found.table
        self._meta.write_durably(found.meta)
        self.hook("recover: written")
        if found.meta.holding == "committed":
            if found.restarted:
                self._journal.clear(lambda epoch: epoch >= found.meta.first)
            assert self._applier is not None and found.table is not None
            self._applier.trim(found.meta)
            self._applier.know(found.table)
        self._adopt(found.meta, found.record)

    def _empty(self) -> None:
        """Make the directory and this object those of an empty replica."""
        self._pending.clear()
        self._journal.clear()
        self._journal.make_room()
        self._stop()
        for path in self.directory.glob("image-*"):
            path.unlink()
        self._adopt(self._meta.meta, None)
        self.table = None

    def _start(self, image: Image, hasher: PageHasher) -> None:
        def hook(point: str) -> None:
            self.hook(point)

        self._applier = Applier(image, hasher, self._meta, self._journal, self._lock, hook)
        self.images = image.rows

    def _stop(self) -> None:
        if self._applier is not None:
            self._applier.image.close()
        self._applier, self.images = None, []

    def _adopt(self, meta: Meta, record: EpochRecord | None) -> None:
        self.holding, self.reason, self.run, self.kind = meta.holding, meta.reason, meta.run, meta.kind
        self.geometry, self.seed, self._term = meta.geometry, meta.seed, meta.term
        self.epoch, self.chain, self.digest = meta.epoch, meta.chain, meta.digest
        self.state = self.held = b""
        self.released = self.mark = 0
        if record is not None:
            self._adopt_record(record)

    def _adopt_record(self, record: EpochRecord) -> None:
        self.epoch, self.chain, self.digest = record.epoch, record.commit.chain, record.commit.digest
        self._term = max(self._term, record.term)
        self.state, self.held, self.released, self.mark = record.state, record.held, record.released, record.mark
