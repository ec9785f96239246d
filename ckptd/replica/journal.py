"""The journal: which epochs a replica retains, and the files that hold them.

    epoch-<N>.seg     the frames of epoch N: its redo log, and what replay and restore read
    epoch-<N>.undo    the pages that epoch N overwrote, and a COMMIT that says what the image was before it
    staged.seg        the epoch that is being received        undo.new, free-*    not in use

An epoch E can be restored if the undos of E+1 to the newest and the segment of E are there. `first` is the oldest
such epoch. A name without `free`, `staged` or `new` belongs to a file that was whole before it got it. Knows no
image.
"""

from __future__ import annotations

import builtins
import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ckptd.errors import JournalError
from ckptd.protocol.messages import Commit, decode
from ckptd.protocol.wire import Type
from ckptd.replica.segment import Pool, Segment, read_frames

__all__ = ["HistoryEntry", "Journal"]

_NAME = re.compile(r"epoch-(\d+)\.(seg|undo)")
_STEP = 1 << 20
_AHEAD = 8  # files made beforehand, by a thread ...
_WORTH = 4 << 20  # ... where they are so large that making one takes milliseconds, and history needs many
_USUAL = 8 << 20  # a new file's size where there will be many: larger epochs make theirs grow, once


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One retained epoch. `time`: when it was committed, ns since 1970; `damage`: why it cannot be read, if so."""

    epoch: int
    term: int
    pages: int
    bytes: int
    time: int
    digest: builtins.bytes
    chain: builtins.bytes
    damage: str = ""

    def as_dict(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "digest": self.digest.hex(), "chain": self.chain.hex()}


class Journal:
    """The segments and undos in a directory. Every size counts what is allocated, since that is what fills a disk."""

    def __init__(self, directory: Path, history: int, history_bytes: int, reserve: int) -> None:
        """Retain `history` epochs before the newest in `history_bytes`; recycle files of at most `reserve` bytes."""
        self.history, self.history_bytes = history, history_bytes
        self._directory = directory
        usual = min(reserve, _USUAL, history_bytes // (2 * history + 3)) if history else reserve
        size = max(_STEP, usual // _STEP * _STEP)
        most, ahead = max(reserve, history_bytes // 2), _AHEAD if history >= 8 * _AHEAD and size >= _WORTH else 0
        self._segments = Pool(directory, ".seg", size, reserve, most, ahead)
        self._undos = Pool(directory, ".undo", size, reserve, most, ahead)
        self._expected = 0  # bytes: epochs are about as large as the one before
        self.segments: dict[int, Segment] = {}
        self.undos: dict[int, Segment] = {}
        self.entries: dict[int, HistoryEntry] = {}
        self.pins: list[int] = []  # epochs that somebody reads: they and all newer ones stay

    def load(self) -> None:
        """Map what an earlier process left, and remove what it had not finished."""
        for path in sorted(self._directory.iterdir()):
            match = _NAME.fullmatch(path.name)
            if match:
                files = self.segments if match[2] == "seg" else self.undos
                files[int(match[1])] = Segment(path, 0)
                files[int(match[1])].settle()
            elif path.suffix in (".seg", ".undo", ".new"):
                path.unlink()
        for epoch, segment in self.segments.items():
            self.entries[epoch] = _entry(epoch, segment)

    @property
    def newest(self) -> int:
        return max(self.segments, default=0)

    def entry(self, epoch: int) -> HistoryEntry:
        missing = HistoryEntry(epoch, 0, 0, 0, 0, b"", b"", "the segment is missing")
        return self.entries.get(epoch, missing)

    def stage(self) -> Segment:
        """An empty segment for the epoch to be received. Raises NoSpace."""
        return self._segments.take("staged.seg", self._expected)

    def start_undo(self, expected: int) -> Segment:
        """An empty segment for an undo of about so many bytes. Raises NoSpace."""
        return self._undos.take("undo.new", expected)

    def add(self, segment: Segment, entry: HistoryEntry) -> None:
        """`segment` has become a committed epoch: it gets its name."""
        segment.rename(f"epoch-{entry.epoch}.seg")
        self._expected = segment.used
        self.segments[entry.epoch], self.entries[entry.epoch] = segment, entry

    def add_undo(self, segment: Segment, epoch: int) -> None:
        """`segment` is whole: it gets its name."""
        segment.rename(f"epoch-{epoch}.undo")
        segment.settle()
        self.undos[epoch] = segment

    def first_to_keep(self, first: int, newest: int) -> int:
        """The oldest epoch that the limits let history keep, not before `first`."""
        wanted = max(first, newest - self.history)
        if newest - wanted > 1 and (self._segments.starved or self._undos.starved):
            wanted += 1  # history deepens as fast as files can be made for it, and no epoch waits for them
        if wanted < newest:
            total = sum(self._cost(epoch) for epoch in range(wanted, newest))
            while wanted < newest and total > self.history_bytes:
                total -= self._cost(wanted)
                wanted += 1
        return max(first, min([wanted, *self.pins]))

    def release(self, first: int, needed: int) -> None:
        """Recycle what neither history from `first` on, nor a pin, nor the redo of epochs after `needed` reads."""
        first = min([first, *self.pins])
        for epoch in [epoch for epoch in self.segments if epoch < first and epoch <= needed]:
            self._segments.give(self.segments.pop(epoch))
            del self.entries[epoch]
        for epoch in [epoch for epoch in self.undos if epoch <= first]:
            self._undos.give(self.undos.pop(epoch))

    def recycle(self, segment: Segment) -> None:
        """A staged segment or undo that will not be finished."""
        (self._undos if segment.path.suffix == ".new" else self._segments).give(segment)

    def make_room(self) -> bool:
        """Give recycled files back to the file system; whether there were any."""
        drained = self._segments.drain()
        return self._undos.drain() or drained

    def clear(self, keep: Callable[[int], bool] = lambda epoch: False) -> None:
        """Remove every epoch that is not to be kept, and all undos."""
        for epoch in [epoch for epoch in self.segments if not keep(epoch)]:
            self.segments.pop(epoch).unlink()
            del self.entries[epoch]
        while self.undos:
            self.undos.popitem()[1].unlink()

    def bytes_after(self, epoch: int) -> int:
        """Bytes of the segments of later epochs."""
        return sum(segment.size for number, segment in self.segments.items() if number > epoch)

    def close(self) -> None:
        for segment in (*self.segments.values(), *self.undos.values()):
            segment.forget()
        self._segments.close()
        self._undos.close()

    def _cost(self, epoch: int) -> int:
        """What dropping this oldest epoch frees: its segment, and the undo that leads back to it."""
        segment, undo = self.segments.get(epoch), self.undos.get(epoch + 1)
        return (segment.size if segment else 0) + (undo.size if undo else 0)


def _entry(epoch: int, segment: Segment) -> HistoryEntry:
    """The entry of a segment that is already there, from its COMMIT."""
    time = segment.path.stat().st_mtime_ns
    try:
        *_, last = read_frames(segment.view, epoch=epoch)
        commit = decode(Type.COMMIT, last.meta)
        assert isinstance(commit, Commit)
    except JournalError as error:
        return HistoryEntry(epoch, 0, 0, segment.size, time, b"", b"", error.message)
    segment.used = last.offset + last.header.frame_length
    return HistoryEntry(epoch, last.header.term, commit.pages, segment.used, time, commit.digest, commit.chain)
