"""The meta file: what a replica holds, in two slots that are written alternately, so that one is whole at any moment.

    0          4          8              16         20         24
    +----------+----------+--------------+----------+----------+------------------+
    |  "CKPM"  | length   | generation   | crc32c   |    0     | msgpack record   |
    |          |   u32    |     u64      |   u32    |          | of `length`      |
    +----------+----------+--------------+----------+----------+------------------+

The crc covers length, generation and record. The newest slot that is whole counts. Slots lie 512 KiB apart, enough for
the most regions that a guest may have; the file is sparse and a usual record fits in one block.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
from crc32c import crc32c

from ckptd.errors import Inconsistent
from ckptd.memory.regions import Geometry, Region
from ckptd.protocol.chain import CHAIN_START
from ckptd.replica.files import allocate, saying, sync_directory, sync_file

__all__ = ["Meta", "MetaFile"]

_HEAD = struct.Struct("<4sIQII")
_COVERED = struct.Struct("<IQ")
_MAGIC = b"CKPM"
_SLOT = 512 << 10
_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Meta:
    """What a replica holds. `epoch` is the last one whose pages are all in the image."""

    holding: str
    guest: str
    boot: str  # the boot of the kernel that wrote this
    kind: str = ""
    run: bytes = bytes(16)
    regions: tuple[tuple[str, int], ...] = ()
    seed: int = 0
    term: int = 0  # the highest that was ever seen
    epoch: int = 0
    first: int = 0  # oldest epoch that can be restored
    first_chain: bytes = CHAIN_START  # the chain before epoch `first`
    direct: int = 0  # the epoch whose pages went straight into the image, so that its segment has none
    synced: int = 0  # the image on stable storage is at least at this epoch; 0: never
    chain: bytes = CHAIN_START
    before: bytes = CHAIN_START  # the chain before `epoch`
    digest: bytes = bytes(16)
    reason: str = ""  # why a partial image is no committed epoch any more

    @property
    def geometry(self) -> Geometry | None:
        return Geometry(tuple(Region(name, pages) for name, pages in self.regions)) if self.regions else None


class MetaFile:
    """The open meta file of one replica."""

    def __init__(self, path: Path, fd: int, meta: Meta, generation: int) -> None:
        self.path = path
        self.meta = meta
        self._fd = fd
        self._generation = generation

    @classmethod
    def open(cls, path: Path, fresh: Meta) -> MetaFile:
        """The meta file at `path`; where there is none, `fresh`. Raises Inconsistent if no slot is whole."""
        if not path.exists():
            cls._create(path, fresh)
        with saying("open the meta file", path):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        slots = [cls._read(fd, slot) for slot in (0, 1)]
        whole = [slot for slot in slots if slot is not None]
        if not whole:
            os.close(fd)
            raise Inconsistent(
                "both copies of the replica's meta are damaged: nobody can say which epoch its image is",
                hint="remove the directory; the primary then sends the whole image again", file=path,
            )  # fmt: skip
        generation, meta = max(whole, key=lambda slot: slot[0])
        return cls(path, fd, meta, generation)

    @classmethod
    def guest_of(cls, path: Path) -> str:
        """Whose meta file this is. Raises Inconsistent."""
        file = cls.open(path, Meta("empty", "", ""))
        file.close()
        return file.meta.guest

    def write(self, meta: Meta) -> None:
        """Replace the older slot. Lasts through the death of this process."""
        self._generation += 1
        data = _encode(meta, self._generation)
        with saying("write the meta file", self.path):
            os.pwrite(self._fd, data, self._generation % 2 * _SLOT)
        self.meta = meta

    def write_durably(self, meta: Meta) -> None:
        """Replace both slots, one after the other: neither says anything older now. Lasts through a power loss."""
        length = -(-len(_encode(meta, 0)) // _BLOCK) * _BLOCK + _BLOCK
        for slot in (0, 1):
            allocate(self._fd, slot * _SLOT, length, self.path)
        for _ in (0, 1):
            self.write(meta)
            sync_file(self._fd, self.path)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @classmethod
    def _create(cls, path: Path, meta: Meta) -> None:
        """Under another name until it is whole."""
        new = path.with_name(path.name + ".new")
        with saying("create the meta file", new):
            fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        file = cls(new, fd, meta, 0)
        try:
            file.write_durably(meta)
            os.rename(new, path)
        except BaseException:
            new.unlink()
            raise
        finally:
            file.close()
        sync_directory(path.parent)

    @staticmethod
    def _read(fd: int, slot: int) -> tuple[int, Meta] | None:
        data = os.pread(fd, _SLOT, slot * _SLOT)
        if len(data) < _HEAD.size:
            return None
        magic, length, generation, crc, _ = _HEAD.unpack_from(data)
        record = data[_HEAD.size : _HEAD.size + length]
        if magic != _MAGIC or len(record) != length or crc != crc32c(_COVERED.pack(length, generation) + record):
            return None
        fields: dict[str, Any] = msgpack.unpackb(record, use_list=False)
        return generation, Meta(**fields)


def _encode(meta: Meta, generation: int) -> bytes:
    record: bytes = msgpack.packb({name: getattr(meta, name) for name in _NAMES})
    crc = crc32c(_COVERED.pack(len(record), generation) + record)
    return _HEAD.pack(_MAGIC, len(record), generation, crc, 0) + record


_NAMES = tuple(field.name for field in dataclasses.fields(Meta))
