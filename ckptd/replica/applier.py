"""Brings an image from one committed epoch to the next, keeps its past, and settles it on stable storage now and then.

Settling goes on beside the application of further epochs: what the image on the disk then has of them, their segments
put right, because those are on stable storage before their pages can be in the image, and stay until the next
settling is done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from ckptd.errors import NoSpace, ReplicaError
from ckptd.memory.digest import HashTable
from ckptd.memory.hashing import Hashes, PageHasher
from ckptd.protocol.chain import CHAIN_START
from ckptd.replica.image import Image
from ckptd.replica.journal import Journal
from ckptd.replica.meta import Meta, MetaFile
from ckptd.replica.segment import EpochRecord
from ckptd.replica.undo import undo_bytes, write_undo
from ckptd.units import PAGE_SIZE

__all__ = ["Applier"]

_SETTLE_BYTES = 256 << 20
_SETTLE_EPOCHS = 16
_LARGE = 16  # an epoch that needs more than this part of history's bytes begins history anew


class Applier:
    """The image of one replica on its way. `lock` is the replica's; callers hold it unless a method says otherwise."""

    def __init__(
        self, image: Image, hasher: PageHasher, meta: MetaFile, journal: Journal, lock: threading.RLock,
        hook: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.image = image
        self.secured = False  # every epoch after `synced` is on stable storage in its segment
        self._broken = False  # stable storage failed once: it must not be asked again
        self._hasher, self._meta, self._journal, self._lock, self._hook = hasher, meta, journal, lock, hook
        self._hashes: list[Hashes] | None = None  # of the image, without any epoch that is not applied
        self._settling: threading.Thread | None = None

    def know(self, table: HashTable) -> None:
        """This is the table of the image as it is; the undos will need its hashes."""
        if self._journal.history:
            self._hashes = [table.region(index).copy() for index in range(len(table.geometry))]

    def apply(self, record: EpochRecord, term: int) -> None:
        """Undo, pages, meta, and what history lets go, in this order."""
        meta, commit = self._meta.meta, record.commit
        anew = replace(meta, first=record.epoch, first_chain=meta.chain)
        if not self._journal.history:
            meta = anew
        elif self._is_large(record) and not self._journal.pins:  # who reads the past is not left without a way to it
            meta = anew  # before the image changes: without an undo nothing leads back from here
            self._meta.write(meta)
        else:
            try:
                self._undo(record)
            except NoSpace:  # history gives way, the guest's protection does not
                self._journal.make_room()
                meta = anew
                self._meta.write(meta)
        self._hook("apply: undo")
        for index, (pages, payload) in enumerate(record.pages):
            self.image.scatter(pages, payload)
            self._hook(f"apply: frame {index}")
        self._update_hashes(record)
        epoch, chain, digest = record.epoch, commit.chain, commit.digest
        self.trim(replace(meta, epoch=epoch, before=meta.chain, chain=chain, digest=digest, term=term))
        self._hook("apply: recycled")

    def trim(self, meta: Meta) -> None:
        """Write this meta, with as little history as the limits ask for, and recycle what it does not name now."""
        first, chain = self._journal.first_to_keep(meta.first, meta.epoch), meta.first_chain
        if first != meta.first:
            chain = meta.before if first == meta.epoch else self._journal.entry(first - 1).chain or CHAIN_START
        self._meta.write(replace(meta, first=first, first_chain=chain))
        self._hook("apply: written")
        self._journal.release(first, self._needed())

    def give_way(self) -> None:
        """Give all the space of history back to the file system."""
        meta = self._meta.meta
        self.trim(replace(meta, first=meta.epoch, first_chain=meta.before))
        self._journal.make_room()

    def sync(self) -> None:
        """The image on stable storage; needs no lock. After a failure there is no second try. Raises ReplicaError."""
        if self._broken:
            raise ReplicaError(
                "the image's file system failed before: nothing is durable here any more",
                hint="replace the disk, or protect the guest at level memory",
            )
        try:
            self.image.sync()
        except ReplicaError:
            with self._lock:
                self._broken, self.secured = True, False
                self._meta.write(replace(self._meta.meta, synced=0))
            raise

    def settle(self) -> None:
        """The image on stable storage, known to be, and segments that only a redo from an older one needs recycled."""
        with self._lock:
            epoch = self._meta.meta.epoch
        self.sync()
        self._hook("settle: image")
        with self._lock:
            self._meta.write_durably(replace(self._meta.meta, synced=max(epoch, self._meta.meta.synced)))
            self._journal.release(self._meta.meta.first, self._needed())

    def settle_if_due(self) -> None:
        """Settle in a thread if enough has come together; wait for it if far too much has. Call it without the lock."""
        with self._lock:
            load = self._settle_load()
            running = self._settling is not None and self._settling.is_alive()
            if load > 1 and not running:
                self._settling = threading.Thread(target=self._settle_quietly, name="settle", daemon=True)
                self._settling.start()
        if load > 2:
            self.wait()

    def wait(self) -> None:
        """Until no settling is under way. Call it without the lock."""
        if self._settling is not None:
            self._settling.join()

    def _settle_quietly(self) -> None:
        with suppress(ReplicaError):  # the next durable commit will say that nothing is durable any more
            self.settle()

    def _settle_load(self) -> float:
        """Above 1: time to settle."""
        meta, journal = self._meta.meta, self._journal
        if not self.secured:
            return 0
        most = min(_SETTLE_BYTES, max(journal.history_bytes // 4, 1 << 20))
        epochs = (meta.epoch - meta.synced) / max(_SETTLE_EPOCHS, journal.history // 4)
        return max(epochs, journal.bytes_after(meta.synced) / most)

    def _needed(self) -> int:
        """Segments after this epoch must stay for the redo after a power loss."""
        return self._meta.meta.synced if self.secured else self._meta.meta.epoch

    def _is_large(self, record: EpochRecord) -> bool:
        return 2 * record.page_count * PAGE_SIZE > self._journal.history_bytes // _LARGE

    def _undo(self, record: EpochRecord) -> None:
        meta, rows = self._meta.meta, self.image.rows
        if self._hashes is None:  # history was off until now
            table = HashTable(self.image.geometry, self._hasher)
            table.rehash(rows)
            self.know(table)
        assert self._hashes is not None
        segment = self._journal.start_undo(undo_bytes(record))
        self._hook("apply: undo started")
        try:
            write_undo(segment, record, rows, self._hashes, self._hasher.zero, meta.chain, meta.digest)
        except NoSpace:
            segment.unlink()
            raise
        self._hook("apply: undo written")
        self._journal.add_undo(segment, record.epoch)

    def _update_hashes(self, record: EpochRecord) -> None:
        if not self._journal.history:
            self._hashes = None
        elif self._hashes is not None:
            for pages, _ in record.pages:
                self._hashes[pages.region][pages.gfns] = pages.hashes
