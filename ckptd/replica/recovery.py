"""Recovery: from what a dead process or host left in the directory to exactly one committed epoch, or none (P2).

In the same boot everything that was written is there: the image is at the epoch that meta names, perhaps with a part
of the next one. In another boot only what was forced to stable storage counts: the image is at least at the epoch
`synced`, with parts of later ones. Either way the segments after that are applied again, each checked byte by byte.
An epoch whose file has its name may have been acknowledged, so it is never dropped: where one is missing or damaged,
the image is declared partial, and the reason is kept. At the end the digest of the image's bytes must be the one that
the newest COMMIT states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ckptd.errors import Inconsistent, JournalError
from ckptd.memory.digest import HashTable
from ckptd.memory.hashing import PageHasher
from ckptd.memory.regions import Geometry
from ckptd.protocol.chain import next_chain
from ckptd.replica.files import saying
from ckptd.replica.image import Image
from ckptd.replica.journal import Journal
from ckptd.replica.meta import Meta
from ckptd.replica.segment import EpochRecord, read_epoch
from ckptd.replica.undo import undo_bytes, write_undo

__all__ = ["Recovered", "recover"]


@dataclass(frozen=True, slots=True)
class Recovered:
    """What is held now. `restarted`: nothing before the newest epoch can be restored any more."""

    meta: Meta
    image: Image
    table: HashTable | None
    record: EpochRecord | None
    restarted: bool


def recover(directory: Path, meta: Meta, journal: Journal, boot: str, hook: Callable[[str], None]) -> Recovered:
    """Bring image and meta to one epoch. The caller writes the meta, durably. Raises NoSpace."""
    geometry = meta.geometry
    assert geometry is not None
    newest = max(journal.newest, meta.epoch)
    with saying("look for the image", directory):
        missing = Image.missing(directory, geometry)
    image = Image(directory, geometry, create=bool(missing))  # a passing error, EMFILE say, must not cost the image
    if missing and meta.holding != "partial":
        meta = _lost(meta, newest, f"the image is not all there: {missing}")
    table = HashTable(geometry, PageHasher(meta.seed))
    same_boot = meta.boot == boot
    meta = replace(meta, boot=boot)
    if meta.holding == "promoted":
        return Recovered(meta, image, None, _record_of(meta, journal, geometry, table), False)
    table.rehash(image.rows)
    if meta.holding == "partial":
        return Recovered(meta, image, table, None, False)
    try:
        done = _Redo(meta, journal, image, table, hook, same_boot).run(newest)
    except (JournalError, Inconsistent) as error:
        return Recovered(_lost(meta, newest, str(error)), image, table, None, False)
    return done


def _lost(meta: Meta, newest: int, reason: str) -> Meta:
    """The image is no committed epoch. Its number is kept: no other content may ever have it."""
    return replace(meta, holding="partial", epoch=newest, synced=0, reason=reason[:500])


def _record_of(meta: Meta, journal: Journal, geometry: Geometry, table: HashTable) -> EpochRecord | None:
    """State and output of the epoch that was promoted, for whoever asks."""
    segment = journal.segments.get(meta.epoch)
    try:
        return None if segment is None else read_epoch(segment.view, meta.epoch, geometry, table.hasher, check=False)
    except JournalError:
        return None


class _Redo:
    """Applies what has to be applied again."""

    def __init__(
        self, meta: Meta, journal: Journal, image: Image, table: HashTable, hook: Callable[[str], None], same_boot: bool
    ) -> None:
        self._meta, self._journal, self._image, self._table, self._hook = meta, journal, image, table, hook
        self._same_boot = same_boot
        self._restarted = not same_boot  # undos are not on stable storage

    def run(self, newest: int) -> Recovered:
        meta, table = self._meta, self._table
        base = meta.epoch if self._same_boot else meta.synced
        if not base:
            raise Inconsistent("the host lost its memory, and the image was never on stable storage")
        chain, before, term = self._chain_at(base), meta.before if base == meta.epoch else None, meta.term
        record: EpochRecord | None = None
        whole = self._same_boot and table.digest == meta.digest
        for epoch in range(base + 1, newest + 1):
            record = self._read(epoch)
            self._check_link(record, chain)
            if self._same_boot and epoch > meta.first:
                self._undo(record, whole, chain)
            self._hook("recover: undo")
            for pages, payload in record.pages:
                self._image.scatter(pages, payload)
                table.update(pages.region, pages.gfns, pages.hashes)
                self._hook("recover: frame")
            whole = True
            before, chain, term = chain, record.commit.chain, max(term, record.term)
        if record is None:
            record = self._read(newest)
        else:
            table.rehash(self._image.rows)
        if table.digest != record.commit.digest:
            raise Inconsistent(
                f"the image has digest {table.digest.hex()}; epoch {newest} must have {record.commit.digest.hex()}"
            )
        if not self._same_boot:
            self._image.sync()
        first = newest if self._restarted else meta.first
        first_chain = meta.first_chain if first == meta.first else before or meta.before
        meta = replace(
            meta, epoch=newest, first=first, first_chain=first_chain, term=term, chain=record.commit.chain,
            before=before or meta.before, digest=record.commit.digest,
            synced=meta.synced if self._same_boot else newest,
        )  # fmt: skip
        return Recovered(meta, self._image, table, record, self._restarted)

    def _chain_at(self, base: int) -> bytes | None:
        """The chain of the epoch from which the redo starts, where it is known."""
        if base == self._meta.epoch:
            return self._meta.chain
        return self._meta.before if base == self._meta.epoch - 1 else None

    def _read(self, epoch: int) -> EpochRecord:
        segment = self._journal.segments.get(epoch)
        if segment is None:
            raise JournalError("the segment is missing", epoch=epoch)
        geometry, hasher = self._table.geometry, self._table.hasher
        return read_epoch(segment.view, epoch, geometry, hasher, check=True, direct=epoch == self._meta.direct)

    def _check_link(self, record: EpochRecord, chain: bytes | None) -> None:
        commit = record.commit
        if chain is not None and commit.chain != next_chain(
            chain, record.epoch, record.term, commit.digest, record.state_crc, record.output_crc
        ):
            raise JournalError("the digest chain does not lead to this epoch", epoch=record.epoch)

    def _undo(self, record: EpochRecord, whole: bool, chain: bytes | None) -> None:
        """See that the epoch has an undo. It is written only from an image that no part of the epoch is in."""
        if record.epoch in self._journal.undos:
            return
        if not whole or not self._journal.history or self._restarted:
            self._restarted = True
            return
        table = self._table
        segment = self._journal.start_undo(undo_bytes(record))
        lanes = [table.region(index) for index in range(len(table.geometry))]
        write_undo(segment, record, self._image.rows, lanes, table.hasher.zero, chain or bytes(16), table.digest)
        self._journal.add_undo(segment, record.epoch)
