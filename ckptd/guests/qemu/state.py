"""The state of a QEMU guest as it travels: what QEMU it was, and the device state that it saved. RAM travels as pages.

    8   magic "CKPTQEMU"
    4   u32 version, 1
    4   u32 bytes of the description
    16  XXH3-128 of all else
    ... the description: msgpack, [how the device state was saved (saving.py), the survey (survey.py)]
    ... the device state, as QEMU wrote it

Nothing of a blob is believed before its hash is right.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import msgpack
import xxhash

from ckptd.errors import GuestError
from ckptd.guests.qemu.saving import BY_COMMAND, WAYS
from ckptd.guests.qemu.survey import Survey

__all__ = ["State", "decode", "describe", "described", "encode"]

_HEAD = struct.Struct("<8sII16s")
_MAGIC, _VERSION = b"CKPTQEMU", 1


@dataclass(frozen=True, slots=True)
class State:
    """A guest at the end of an epoch, without its RAM."""

    survey: Survey
    devices: bytes
    way: str = BY_COMMAND


def describe(survey: Survey, way: str = BY_COMMAND) -> bytes:
    """The description."""
    packed: bytes = msgpack.packb([way, survey.as_dict()])
    return packed


def described(about: bytes) -> tuple[str, Survey]:
    """How the device state was saved, and the QEMU. Raises GuestError."""
    try:
        way, raw = msgpack.unpackb(about)
        survey = Survey.from_dict(raw)
    except Exception as error:
        raise GuestError(f"the state's description of QEMU cannot be read: {error}") from error
    if way not in WAYS:
        raise GuestError(
            f"the state was saved in a way that this ckptd does not know: {way!r}", hint="run one version on both hosts"
        )
    return way, survey


def encode(about: bytes, devices: bytes) -> bytes:
    """The blob. `about`: the description, packed once for all epochs (`describe`)."""
    body = about + devices
    return _HEAD.pack(_MAGIC, _VERSION, len(about), _digest(len(about), body)) + body


def decode(blob: bytes) -> State:
    """Raises GuestError for what is not whole, or of another version."""
    if len(blob) < _HEAD.size:
        raise GuestError(f"the state of a QEMU guest has {len(blob)} bytes: it was cut off")
    magic, version, length, digest = _HEAD.unpack_from(blob)
    if magic != _MAGIC:
        raise GuestError("this is not the state of a QEMU guest")
    if version != _VERSION:
        raise GuestError(
            f"the state is of version {version}, and this ckptd knows {_VERSION}", hint="run one version on both hosts"
        )
    body = blob[_HEAD.size :]
    if _digest(length, body) != digest or length > len(body):
        raise GuestError("the state of the QEMU guest is damaged: nothing of it was used")
    way, survey = described(body[:length])
    return State(survey, body[length:], way)


def _digest(length: int, body: bytes) -> bytes:
    hashed = xxhash.xxh3_128(struct.pack("<8sII", _MAGIC, _VERSION, length))
    hashed.update(body)
    return hashed.digest()
