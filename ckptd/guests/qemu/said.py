"""What a QEMU guest has said on its chardevs and nobody has let go: as it comes from the keeper, and as it travels.

Nobody repeats these bytes as TCP repeats a packet, so they belong to the checkpoint. The blob:

    8   magic "CKPTSAID"
    4   u32 version, 1
    16  XXH3-128 of all else
    ... msgpack: {label: bytes}

Nothing of a blob is believed before its hash is right. The keeper leaves records in a file that the daemon has, too:

    8   u64 number of the output
    4   u32 which of the configured chardevs, from 0
    4   u32 bytes
    ... the bytes
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping

import msgpack
import xxhash

from ckptd.errors import GuestError

__all__ = ["Record", "decode_said", "encode_said", "records", "write_records"]

Record = tuple[int, int, bytes]
"""The number of an output, the index of its chardev, and what was said."""

_HEAD = struct.Struct("<8sI16s")
_MAGIC, _VERSION = b"CKPTSAID", 1
_RECORD = struct.Struct("<QII")


def encode_said(said: Mapping[str, bytes]) -> bytes:
    """The blob; nothing at all where nothing was said."""
    if not any(said.values()):
        return b""
    body: bytes = msgpack.packb({label: data for label, data in said.items() if data})
    return _HEAD.pack(_MAGIC, _VERSION, _digest(body)) + body


def decode_said(blob: bytes) -> dict[str, bytes]:
    """By label. Raises GuestError for what is not whole, or of another version."""
    if not blob:
        return {}
    if len(blob) < _HEAD.size:
        raise GuestError(f"the held output of a QEMU guest has {len(blob)} bytes: it was cut off")
    magic, version, digest = _HEAD.unpack_from(blob)
    if magic != _MAGIC:
        raise GuestError("this is not the held output of a QEMU guest")
    if version != _VERSION:
        raise GuestError(
            f"the held output is of version {version}, and this ckptd knows {_VERSION}",
            hint="run one version on both hosts",
        )
    body = blob[_HEAD.size :]
    if _digest(body) != digest:
        raise GuestError("the held output of the QEMU guest is damaged: nothing of it was used")
    try:
        said = msgpack.unpackb(body)
    except Exception as error:
        raise GuestError(f"the held output of the QEMU guest cannot be read: {error}") from error
    if not isinstance(said, dict) or not all(isinstance(one, str) for one in said):
        raise GuestError("the held output of the QEMU guest is no table of labels")
    if not all(isinstance(data, bytes) for data in said.values()):
        raise GuestError("the held output of the QEMU guest has something that is no bytes")
    return said


def _digest(body: bytes) -> bytes:
    hashed = xxhash.xxh3_128(struct.pack("<8sI", _MAGIC, _VERSION))
    hashed.update(body)
    return hashed.digest()


def write_records(found: Iterable[Record]) -> bytes:
    """For the file that keeper and daemon share."""
    return b"".join(_RECORD.pack(number, index, len(data)) + data for number, index, data in found)


def records(blob: bytes) -> Iterator[Record]:
    """What `write_records` has written."""
    at = 0
    while at < len(blob):
        number, index, size = _RECORD.unpack_from(blob, at)
        at += _RECORD.size + size
        yield number, index, blob[at - size : at]
