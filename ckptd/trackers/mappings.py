"""What another process has mapped where: do its regions still exist, and are they still the same memory?

PAGEMAP_SCAN does not tell: it passes over what is not mapped, and over a whole process that has ended, as if nothing
had been written there. So this is asked beside every harvest.

    struct procmap_query of PROCMAP_QUERY (Linux 6.11), 104 bytes
    u64 size | flags | addr | start | end | vma flags | page size | offset | inode, u32 dev major | dev minor |
    name size | build id size, u64 name | build id

Before Linux 6.11 the text of /proc/PID/maps is read. Both are opened once: they stay with the memory of that program
when the process runs another or ends, and then fail. Source: Linux include/uapi/linux/fs.h, fs/proc/task_mmu.c.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ckptd.errors import TrackerError, TrackerUnavailable
from ckptd.memory.regions import Geometry
from ckptd.units import PAGE_SIZE

__all__ = ["Mapping", "ProcessMemory"]

_QUERY = 0xC0686611  # _IOWR('f', 17, 104)
_QUERY_FIELDS = struct.Struct("<9Q4I2Q")
_OR_NEXT, _SHARED = 0x10, 0x08


class Mapping(NamedTuple):
    """A range of addresses and what is there; `file` and `offset` are zero for private anonymous memory."""

    start: int
    end: int
    shared: bool
    file: tuple[int, int, int]
    """Device (major, minor) and inode."""
    offset: int
    page_size: int
    """Of the page tables: 4096, more for hugetlbfs; 0 where the kernel did not say."""


class ProcessMemory:
    """The regions of a guest in the memory of a process. `addresses`: where each region begins there."""

    def __init__(self, geometry: Geometry, pid: int, addresses: Sequence[int]) -> None:
        if len(addresses) != len(geometry):
            raise TrackerError(f"{len(addresses)} addresses for a guest of {len(geometry)} regions")
        for region, address in zip(geometry, addresses, strict=True):
            if address % PAGE_SIZE or not 0 < address <= (1 << 63) - region.size_bytes:
                raise TrackerError(f"region {region.name} cannot begin at {address:#x} in process {pid}")
        self.pid = pid
        self.names = [region.name for region in geometry]
        self.ranges = [(at, at + region.size_bytes) for region, at in zip(geometry, addresses, strict=True)]
        self.exact_pages = False
        """True: every region has page tables of 4 KiB pages, so that no write marks a neighbour."""
        self._maps = -1
        self._first: list[tuple[Mapping, ...]] = []

    def open(self) -> None:
        """Look at it for the first time; what `check` compares with. Raises TrackerUnavailable, TrackerError."""
        self.close()
        path = f"/proc/{self.pid}/maps"
        try:
            self._maps = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise TrackerUnavailable(f"process {self.pid} is gone", hint="start the guest first") from error
        except OSError as error:
            raise TrackerUnavailable(
                f"{path}: {error.strerror}", hint="run as root, as the user of that process, or with CAP_SYS_PTRACE"
            ) from error
        found = [self._find(index) for index in range(len(self.ranges))]
        self._first = [_joined(one) for one in found]
        self.exact_pages = all(mapping.page_size == PAGE_SIZE for one in found for mapping in one)

    def check(self) -> None:
        """Raises TrackerError when the process has ended, or part of a region is not mapped, or maps something else.

        The same file or anonymous memory mapped anew is no error here: PAGEMAP_SCAN notices that.
        """
        for index, first in enumerate(self._first):
            if (now := _joined(self._find(index))) != first:
                raise TrackerError(
                    f"process {self.pid} has other memory at its region now: {_shown(now)}, not {_shown(first)}",
                    hint="start the tracker anew with the region's address and send everything again",
                    region=self.names[index],
                )

    def close(self) -> None:
        if self._maps >= 0:
            os.close(self._maps)
            self._maps = -1

    def gone(self) -> TrackerError:
        return TrackerError(
            f"process {self.pid} has ended, or runs another program",
            hint="its memory cannot be read any more; promote the other side, or start the guest again",
        )

    def _find(self, index: int) -> list[Mapping]:
        """What is mapped in this region, cut to it. Raises TrackerError if not all of it is."""
        start, end = self.ranges[index]
        found: list[Mapping] = []
        at = start
        try:
            for mapping in self._mappings(start, end):
                if mapping.start > at:
                    break
                found.append(_cut(mapping, start, end))
                at = mapping.end
                if at >= end:
                    return found
        except ProcessLookupError as error:
            raise self.gone() from error
        raise TrackerError(
            f"process {self.pid} has nothing mapped at {at:#x}, in the region that begins at {start:#x}",
            hint="it has unmapped or moved the region: start anew with the right address and send everything again",
            region=self.names[index],
        )

    def _mappings(self, start: int, end: int) -> Iterator[Mapping]:
        """Ascending, from the one at or after `start`. Raises ProcessLookupError when the process has ended."""
        at = start
        while at < end:
            query = bytearray(_QUERY_FIELDS.pack(_QUERY_FIELDS.size, _OR_NEXT, at, *(0,) * 12))
            try:
                fcntl.ioctl(self._maps, _QUERY, query)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return
                if error.errno == errno.ENOTTY:
                    yield from self._from_text(start)
                    return
                raise
            _, _, _, first, at, flags, size, offset, inode, major, minor, *_ = _QUERY_FIELDS.unpack(query)
            yield Mapping(first, at, bool(flags & _SHARED), (major, minor, inode), offset, size)

    def _from_text(self, start: int) -> Iterator[Mapping]:
        """The same from lines "start-end perms offset major:minor inode path"."""
        os.lseek(self._maps, 0, os.SEEK_SET)
        with open(self._maps, "rb", closefd=False) as maps:
            text = maps.read()
        if not text:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        for line in text.splitlines():
            addresses, permissions, offset, device, inode = line.split(None, 5)[:5]
            first, last = (int(one, 16) for one in addresses.split(b"-"))
            if last > start:
                major, minor = (int(one, 16) for one in device.split(b":"))
                yield Mapping(first, last, permissions[3:4] == b"s", (major, minor, int(inode)), int(offset, 16), 0)


def _cut(mapping: Mapping, start: int, end: int) -> Mapping:
    first = max(mapping.start, start)
    anonymous = mapping.file == (0, 0, 0)
    offset = 0 if anonymous else mapping.offset + first - mapping.start
    return mapping._replace(start=first, end=min(mapping.end, end), offset=offset)


def _joined(mappings: Sequence[Mapping]) -> tuple[Mapping, ...]:
    """Neighbours that go on with the same memory are one: mprotect and madvise split mappings, and merge them."""
    joined: list[Mapping] = []
    for one in mappings:
        if joined and (last := joined[-1]):
            goes_on = one.file == (0, 0, 0) or one.offset == last.offset + last.end - last.start
            if (one.shared, one.file, one.page_size) == (last.shared, last.file, last.page_size) and goes_on:
                joined[-1] = last._replace(end=one.end)
                continue
        joined.append(one)
    return tuple(joined)


def _shown(mappings: Sequence[Mapping]) -> str:
    return " + ".join(
        f"{one.start:#x}-{one.end:#x} {'shared' if one.shared else 'private'}"
        + (f" inode {one.file[2]} at {one.offset:#x}" if any(one.file) else "")
        for one in mappings
    )
