"""Segments: files of frames, written through a mapping. Staged epoch, committed epoch and undo are one each.

A segment is preallocated and mapped once, and used again for another epoch when history lets go of it: it then keeps
its blocks and its page tables, and what lies after its COMMIT is garbage that nobody reads. `Pool` keeps such files.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import cast

import numpy as np
from crc32c import crc32c

from ckptd.errors import CkptdError, CorruptFrame, JournalError, NoSpace, ReplicaError
from ckptd.memory.batch import RAW
from ckptd.memory.hashing import PageHasher, Rows, same
from ckptd.memory.regions import Geometry
from ckptd.protocol.messages import Commit, Output, State, decode
from ckptd.protocol.pages import Pages, decode_pages
from ckptd.protocol.wire import HEADER_SIZE, Buffer, Header, Type, unpack_header
from ckptd.replica.files import allocate, map_file, populate, saying, sync_file
from ckptd.units import PAGE_SIZE

__all__ = ["EpochRecord", "FrameAt", "Pool", "Segment", "read_epoch", "read_frames", "rows_of"]

_STEP = 1 << 20
_LARGE_ARE_OVER = 32  # takes
_SPAN = 4 << 30  # bytes of address space for each segment
_LEAST_AHEAD = 4 << 20  # bytes that a segment grows by, at least
_FAR_TOO_LARGE = 3  # times what is expected: such a file gives its blocks back


class Segment:
    """One file of frames. `used` bytes of it are frames; `size` bytes are allocated and mapped."""

    __slots__ = ("_fd", "_map", "_span", "path", "size", "used", "view")

    def __init__(self, path: Path, size: int) -> None:
        """Create the file with `size` bytes, or map the one that exists. Raises NoSpace, leaving nothing behind."""
        existed = path.exists()
        with saying("open a segment", path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.path, self.used, self.size = path, 0, os.fstat(self._fd).st_size
        self.view = memoryview(b"")
        self._map: mmap.mmap | None = None
        self._span = 0
        try:
            if not existed:
                self._grow_to(_round(size))
            elif self.size:
                self.view = memoryview(self._map_for(self.size))[: self.size]
        except BaseException:
            self.forget()
            if not existed:
                path.unlink()
            raise

    def ensure(self, length: int) -> None:
        """Room for `length` more bytes. Raises NoSpace; what is in the segment stays."""
        needed = self.used + length
        if needed > self.size:
            try:
                self._grow_to(_round(max(needed, self.size + max(_LEAST_AHEAD, self.size // 4))))
            except NoSpace:
                self._grow_to(_round(needed))

    def place(self, head: bytes, payload_length: int) -> memoryview:
        """Append header and meta; returns where the payload goes, which counts as written."""
        begin = self.used + len(head)
        end = begin + payload_length
        if end > self.size:
            self.ensure(end - self.used)
        self.view[self.used : begin] = head
        self.used = end
        return self.view[begin:end]

    def append(self, *buffers: Buffer) -> None:
        """Append buffers as they are."""
        self.ensure(sum(len(buffer) for buffer in buffers))
        for buffer in buffers:
            self.view[self.used : self.used + len(buffer)] = buffer
            self.used += len(buffer)

    def rename(self, name: str) -> None:
        new = self.path.with_name(name)
        with saying("rename a segment", self.path):
            os.rename(self.path, new)
        self.path = new

    def sync(self) -> None:
        """fdatasync: what is in the file lasts through a power loss."""
        fd = self._fd if self._fd >= 0 else os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            sync_file(fd, self.path)
        finally:
            if fd != self._fd:
                os.close(fd)

    def settle(self) -> None:
        """No more writing for now: the mapping stays, the descriptor goes."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def shrink(self, size: int) -> None:
        """Give back what lies behind `size`; nobody may have a view of it."""
        if size < self.size:
            self._open()
            os.ftruncate(self._fd, size)
            self.size = size
            self.view = self.view[:size]

    def forget(self) -> None:
        """Let go of the mapping, which lives on while somebody has a view of it, and leave the file."""
        self.settle()
        self.view = memoryview(b"")
        self._map = None

    def unlink(self) -> None:
        self.forget()
        self.path.unlink(missing_ok=True)

    def _grow_to(self, size: int) -> None:
        self._open()
        old = self.size
        allocate(self._fd, old, size - old, self.path)
        self.size = size
        if size > self._span:
            self._map_for(size)
            old = 0
        assert self._map is not None
        self.view = memoryview(self._map)[:size]
        populate(self._map, old, size - old)

    def _open(self) -> None:
        if self._fd < 0:
            with saying("open a segment", self.path):
                self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)

    def _map_for(self, size: int) -> mmap.mmap:
        """Map much more than the file has, so that it can grow within the mapping: its page tables are worth keeping.

        Nothing beyond `size` is ever touched: that would be SIGBUS. Views of an older mapping stay valid.
        """
        with saying("map a segment", self.path):
            self._span = max(_SPAN, 4 * size)
            try:
                os.ftruncate(self._fd, self._span)  # the mmap module maps no more than the file has
                self._map = map_file(self._fd, self._span)
            except OSError:  # a file system with small files
                self._span = size
                self._map = map_file(self._fd, size)
            finally:
                os.ftruncate(self._fd, size)
        return self._map


def _round(size: int) -> int:
    return -(-size // _STEP) * _STEP


class Pool:
    """Segments of one suffix that are not in use, ready for the next epoch. One thread may give while another takes.

    Spares of more than the usual size are for runs of large epochs, which would otherwise spend most of their time on
    making and removing files; they go once a run of small ones shows that the large ones are over.
    """

    def __init__(self, directory: Path, suffix: str, size: int, keep: int, most: int, ahead: int) -> None:
        """New files have `size` bytes; files above `keep` bytes are large: two are kept, of at most `most` bytes.

        At most `most` bytes of others are kept. So many as `ahead` says are made beforehand by a thread.
        """
        self._directory, self._suffix, self._size = directory, suffix, size
        self._keep, self._most, self._ahead = max(size, keep), max(size, most), ahead
        self._free: list[Segment] = []
        self._lock = threading.Lock()
        self._numbers = count(1)
        self._small_takes = self._expected = 0
        self._making: threading.Thread | None = None
        self._closed = self._missed = False

    def take(self, name: str, expected: int = 0) -> Segment:
        """An empty segment of this name, for about so many bytes. Raises NoSpace."""
        with self._lock:
            self._expected = expected
            segment = self._fit(expected)
            self._missed = segment is None
            if segment is not None:
                self._free.remove(segment)
                segment.rename(name)
                segment.used = 0
            self._small_takes = 0 if expected > self._keep else self._small_takes + 1
            if self._small_takes > _LARGE_ARE_OVER:
                self._unlink([one for one in self._free if one.size > self._keep])
            if len(self._free) < self._ahead and not (self._making and self._making.is_alive()):
                self._making = threading.Thread(target=self._make_ahead, name="segments", daemon=True)
                self._making.start()
        return segment or Segment(self._directory / name, max(self._size, expected))

    def _fit(self, expected: int) -> Segment | None:
        """The smallest that is large enough, if it is not far too large; else the largest of the usual ones."""
        enough = [one for one in self._free if expected <= one.size <= max(self._keep, 4 * expected)]
        usual = [one for one in self._free if one.size <= self._keep]
        if enough:
            return min(enough, key=lambda one: one.size)
        return max(usual, key=lambda one: one.size) if usual and expected <= self._keep else None

    def give(self, segment: Segment) -> None:
        """Take back a segment that no epoch needs any more."""
        with self._lock:
            if segment.size > self._keep:
                spare = sum(one.size > self._keep for one in self._free) < 2 and segment.size <= self._most
            else:
                usual = [one.size for one in self._free if one.size <= self._keep]
                spare = len(usual) < 2 or sum(usual) + segment.size <= self._most
            if not spare:
                segment.unlink()
                return
            usual_size = _round(max(self._size, self._expected))
            if self._keep >= segment.size > _FAR_TOO_LARGE * usual_size:
                segment.shrink(usual_size)
            segment.rename(f"free-{next(self._numbers)}{self._suffix}")
            segment.settle()
            self._free.append(segment)

    @property
    def starved(self) -> bool:
        """The thread that makes files does not keep up: the last epoch had to wait for one."""
        return self._ahead > 0 and self._missed

    def _make_ahead(self) -> None:
        """Allocating and zeroing a file takes as long as receiving an epoch: do it beside the epochs."""
        for _ in range(self._ahead):
            found = os.statvfs(self._directory)
            if found.f_bavail * found.f_frsize < 16 * self._size:
                return
            name = f"free-{next(self._numbers)}{self._suffix}"
            with suppress(ReplicaError):
                segment = Segment(self._directory / name, self._size)
                segment.settle()
                with self._lock:
                    if self._closed:
                        segment.unlink()
                        return
                    self._free.append(segment)

    def _unlink(self, segments: list[Segment]) -> None:
        for segment in segments:
            self._free.remove(segment)
            segment.unlink()

    def drain(self) -> bool:
        """Give the space back to the file system; whether there was any."""
        with self._lock:
            drained = bool(self._free)
            self._unlink(list(self._free))
        return drained

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for segment in self._free:
                segment.forget()


@dataclass(frozen=True, slots=True)
class FrameAt:
    """A frame in a segment: where it begins, and its parts. `payload` is a view of the file."""

    offset: int
    header: Header
    meta: bytes
    payload: memoryview


def read_frames(view: memoryview, *, epoch: int | None = None, used: int | None = None) -> Iterator[FrameAt]:
    """The frames from the start of `view` to the first COMMIT, or to `used` where that is known.

    Header and meta checksums are checked, payloads are not. Raises JournalError at the first thing that is no frame
    of `epoch`.
    """
    offset, end = 0, len(view) if used is None else used
    while used is None or offset < end:
        try:
            if end - offset < HEADER_SIZE:
                raise CorruptFrame("the file ends before its COMMIT")
            header = unpack_header(view[offset : offset + HEADER_SIZE])
            begin = offset + HEADER_SIZE + header.meta_length
            if begin + header.payload_length > end:
                raise CorruptFrame("a frame goes beyond the end of the file")
            meta = bytes(view[offset + HEADER_SIZE : begin])
            if crc32c(meta) != header.meta_crc:
                raise CorruptFrame("the checksum of a frame's meta differs")
            if epoch is not None and header.epoch != epoch:
                raise CorruptFrame(f"a frame of epoch {header.epoch} in the file of another")
        except CkptdError as error:
            raise JournalError(f"the segment is damaged: {error.message}", epoch=epoch, offset=offset) from error
        yield FrameAt(offset, header, meta, view[begin : begin + header.payload_length])
        offset = begin + header.payload_length
        if header.type is Type.COMMIT and used is None:
            return


@dataclass(slots=True)
class EpochRecord:
    """What a segment says about its epoch, read from its frames."""

    epoch: int
    term: int
    commit: Commit
    pages: list[tuple[Pages, memoryview]]  # every PAGES frame, in order, with its payload
    state: bytes
    held: bytes
    released: int
    mark: int
    state_crc: int
    output_crc: int
    used: int

    @property
    def page_count(self) -> int:
        return sum(len(pages.gfns) for pages, _ in self.pages)


def rows_of(payload: memoryview) -> Rows:
    """The raw pages of a payload, shape (n, 4096), without a copy."""
    return np.frombuffer(payload, dtype=np.uint8).reshape(-1, PAGE_SIZE)


def read_epoch(
    view: memoryview, epoch: int, geometry: Geometry, hasher: PageHasher, *, check: bool, direct: bool = False
) -> EpochRecord:
    """Read the segment of an epoch. `check`: hash pages, sum blobs and count, too; `direct`: its pages are elsewhere.

    Raises JournalError saying at which offset it is damaged.
    """
    pages: list[tuple[Pages, memoryview]] = []
    state, output = State(0), Output(0, 0, 0)
    blobs = {Type.STATE: memoryview(b""), Type.OUTPUT: memoryview(b"")}
    offset = 0
    try:
        for frame in read_frames(view, epoch=epoch):
            offset, header = frame.offset, frame.header
            match header.type:
                case Type.PAGES:
                    one = decode_pages(header, frame.meta, geometry, hasher)
                    if check and not _as_hashed(one, frame.payload, hasher):
                        raise CorruptFrame("a page is not what its hash says")
                    pages.append((one, frame.payload))
                case Type.STATE | Type.OUTPUT:
                    message = cast(State | Output, decode(header.type, frame.meta))
                    if check and crc32c(frame.payload) != message.crc:
                        raise CorruptFrame(f"the checksum of the {header.type.name.lower()} differs")
                    blobs[header.type] = frame.payload
                    if isinstance(message, Output):
                        output = message
                    else:
                        state = message
                case Type.COMMIT:
                    commit = cast(Commit, decode(header.type, frame.meta))
                    record = EpochRecord(
                        epoch, header.term, commit, pages, bytes(blobs[Type.STATE]), bytes(blobs[Type.OUTPUT]),
                        output.released, output.mark, state.crc, output.crc, offset + header.frame_length,
                    )  # fmt: skip
                    if check and not direct and record.page_count != commit.pages:
                        raise CorruptFrame(f"it has {record.page_count} pages; its commit says {commit.pages}")
                    return record
                case Type.ITERATION:
                    pass
                case _:
                    raise CorruptFrame(f"a {header.type.name} frame in a segment")
    except JournalError:
        raise
    except CkptdError as error:
        raise JournalError(f"the segment is damaged: {error.message}", epoch=epoch, offset=offset) from error
    raise AssertionError("read_frames ends at COMMIT or raises")


def _as_hashed(pages: Pages, payload: memoryview, hasher: PageHasher) -> bool:
    raw = pages.kinds == RAW
    if pages.raw * PAGE_SIZE != len(payload):  # a delta, which no segment may hold
        return False
    return bool(same(hasher.hash_buffer(payload), pages.hashes[raw]).all())
