"""The archive that a kernel unpacks as its first file system: cpio in the form `newc`, written and listed."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

__all__ = ["Entry", "pack", "unpack"]

_MAGIC = "070701"
_END = "TRAILER!!!"
_HEADER = 6 + 13 * 8


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the archive; a folder if its mode says so. Owner and group are root."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)

    @classmethod
    def folder(cls, name: str) -> Entry:
        return cls(name, stat.S_IFDIR | 0o755)

    @classmethod
    def program(cls, name: str, data: bytes) -> Entry:
        return cls(name, stat.S_IFREG | 0o755, data)

    @classmethod
    def file(cls, name: str, data: bytes) -> Entry:
        return cls(name, stat.S_IFREG | 0o644, data)

    @classmethod
    def character_device(cls, name: str, major: int, minor: int) -> Entry:
        return cls(name, stat.S_IFCHR | 0o600, device=(major, minor))


def pack(entries: Iterable[Entry]) -> bytes:
    """The archive. The same entries give the same bytes: no time, owner or number of this machine is in it."""
    out = bytearray()
    for number, entry in enumerate([*entries, Entry(_END, 0)], start=1):
        name = entry.name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(entry.mode) else 1
        fields = [number, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0]
        out += (_MAGIC + "".join(f"{field:08x}" for field in fields)).encode() + name
        out += bytes(-len(out) % 4) + entry.data
        out += bytes(-len(out) % 4)
    return bytes(out)


def unpack(archive: bytes) -> Iterator[Entry]:
    """What is in an archive. Raises ValueError where it is none, or ends early."""
    at = 0
    while True:
        header = archive[at : at + _HEADER]
        if len(header) < _HEADER or header[:6] != _MAGIC.encode():
            raise ValueError(f"no entry of a newc archive at byte {at}")
        fields = [int(header[place : place + 8], 16) for place in range(6, _HEADER, 8)]
        mode, size, major, minor, name_size = fields[1], fields[6], fields[9], fields[10], fields[11]
        name = archive[at + _HEADER : at + _HEADER + name_size - 1].decode()
        data_at = at + _HEADER + name_size
        data_at += -data_at % 4
        at = data_at + size + -size % 4
        if at > len(archive):
            raise ValueError(f"the archive ends within {name!r}")
        if name == _END:
            return
        yield Entry(name, mode, archive[data_at : data_at + size], (major, minor))
