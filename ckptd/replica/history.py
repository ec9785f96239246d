"""History: the image as of any retained epoch, and whether the retained files are whole.

A restore copies the newest image, while epochs may go on, and then applies undos backwards. Whatever an epoch changed
under the copy is put right by the undo of that same epoch, so nobody has to wait; the retained epochs are pinned
meanwhile. What comes out is checked against the digest of the epoch's COMMIT.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ckptd.errors import CkptdError, JournalError, StateError, VerifyFailed
from ckptd.memory.digest import HashTable
from ckptd.protocol.chain import next_chain
from ckptd.replica.files import saying
from ckptd.replica.image import Image
from ckptd.replica.meta import MetaFile
from ckptd.replica.replica import Replica
from ckptd.replica.segment import EpochRecord, read_epoch

__all__ = ["Damage", "Restored", "opened", "restore", "restore_image", "verify_history"]


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore wrote."""

    epoch: int
    term: int
    digest: bytes
    out: Path

    def as_dict(self) -> dict[str, object]:
        return {"epoch": self.epoch, "term": self.term, "digest": self.digest.hex(), "out": str(self.out)}


@dataclass(frozen=True, slots=True)
class Damage:
    """The first retained epoch whose files are not what was written."""

    epoch: int
    file: str
    reason: str


@contextmanager
def opened(source: Replica | Path) -> Iterator[Replica]:
    """A replica that is open already, or the one in a directory. Raises StateError if a daemon has that open."""
    if isinstance(source, Replica):
        yield source
        return
    if not (source / "meta").exists():
        raise StateError("there is no replica in this directory", directory=source)
    guest = MetaFile.guest_of(source / "meta")
    replica = Replica.open(source, guest=guest, history=1 << 40, history_bytes=1 << 62, reserve=0)
    try:
        yield replica
    finally:
        replica.close()


def restore(source: Replica | Path, epoch: int, out: Path) -> Restored:
    """Write the files `image-<region>`, `state`, `output` and `epoch.json` of a retained epoch into directory `out`.

    May run in a thread beside commits and applies. Raises StateError (not retained, or `out` is there already),
    JournalError (a file is damaged), VerifyFailed (the image is not what its COMMIT says), NoSpace.
    """
    with opened(source) as replica:
        if out.exists() and any(out.iterdir()):
            raise StateError("the directory to restore into is not empty", directory=out)
        with saying("make the directory", out):
            out.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            try:
                image, record = restore_image(replica, epoch, out)
            except StateError:  # nothing was written
                out.rmdir()
                raise
            image.close()
            (out / "state").write_bytes(record.state)
            (out / "output").write_bytes(record.held)
            about = {
                "guest": replica.guest, "kind": replica.kind, "run": replica.run.hex(), "epoch": epoch,
                "term": record.term,
                "digest": record.commit.digest.hex(), "chain": record.commit.chain.hex(), "seed": replica.seed,
                "released": record.released, "mark": record.mark,
                "regions": [
                    {"name": region.name, "pages": region.pages, "file": path.name}
                    for region, path in zip(image.geometry, image.paths, strict=True)
                ],
            }  # fmt: skip
            (out / "epoch.json").write_text(json.dumps(about, indent=2) + "\n")
        except OSError as error:
            with saying("write what was restored", out):
                raise error
    return Restored(epoch, record.term, record.commit.digest, out)


def restore_image(replica: Replica, epoch: int, directory: Path) -> tuple[Image, EpochRecord]:
    """The image as of a retained epoch, in new files in `directory`, and the epoch. Raises as `restore`."""
    with replica.pinned(epoch) as journal:
        geometry, table = replica.geometry, replica.table
        assert geometry is not None and table is not None
        direct = epoch == replica.direct_epoch
        record = read_epoch(journal.segments[epoch].view, epoch, geometry, table.hasher, check=True, direct=direct)
        image = Image(directory, geometry, create=True)
        try:
            image.copy_from(replica.images)
            for later in range(replica.applied(), epoch, -1):
                undo = _undo(replica, later)
                for pages, payload in undo.pages:
                    image.scatter(pages, payload)
            found = HashTable(geometry, table.hasher)
            found.rehash(image.rows)
            if found.digest != record.commit.digest:
                raise VerifyFailed(
                    f"the restored image has digest {found.digest.hex()}, not {record.commit.digest.hex()}",
                    hint="find the damaged epoch with `ckptd verify --history`", epoch=epoch,
                )  # fmt: skip
        except BaseException:
            image.close()
            image.unlink()
            raise
    return image, record


def verify_history(source: Replica | Path) -> Damage | None:
    """Check every retained segment and undo, byte by byte, and their chain; the oldest damaged one, or None."""
    with opened(source) as replica:
        entries = replica.history()
        if not entries:
            return None
        with replica.pinned(entries[0].epoch) as journal:
            geometry, table, chain = replica.geometry, replica.table, None
            assert geometry is not None and table is not None
            for epoch in range(entries[0].epoch, replica.applied() + 1):
                direct = epoch == replica.direct_epoch
                file = f"epoch-{epoch}.seg"
                try:
                    if epoch not in journal.segments:
                        raise JournalError("the segment is missing", epoch=epoch)
                    view = journal.segments[epoch].view
                    record = read_epoch(view, epoch, geometry, table.hasher, check=True, direct=direct)
                    expected = record.commit.chain if chain is None else next_chain(
                        chain, epoch, record.term, record.commit.digest, record.state_crc, record.output_crc
                    )  # fmt: skip
                    if record.commit.chain != expected:
                        raise JournalError("the digest chain does not lead to this epoch", epoch=epoch)
                    file = f"epoch-{epoch}.undo"
                    if chain is not None and _undo(replica, epoch).commit.chain != chain:
                        raise JournalError("the undo is not of this epoch", epoch=epoch)
                    chain = record.commit.chain
                except CkptdError as error:
                    return Damage(epoch, file, str(error))
    return None


def _undo(replica: Replica, epoch: int) -> EpochRecord:
    """The undo of an epoch, checked."""
    geometry, table = replica.geometry, replica.table
    assert geometry is not None and table is not None
    undo = replica.undo_of(epoch)
    if undo is None:
        raise JournalError("the undo is missing", epoch=epoch)
    return read_epoch(undo.view, epoch - 1, geometry, table.hasher, check=True)
