"""Valid sessions, and what chance makes of them: bits, fields, lengths, order; with and without repaired checksums."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

import msgpack

from ckptd.memory.regions import Geometry
from ckptd.protocol.wire import Type

from ..protocol.world import Frame, MemoryHolding, World, frames

__all__ = ["GEOMETRY", "mutated", "valid_sessions"]

GEOMETRY = Geometry.of(low=4, ram=16)
Session = list[Frame]

NUMBERS = [
    0,
    1,
    2,
    3,
    15,
    16,
    17,
    255,
    4096,
    4097,
    65535,
    65536,
    (1 << 24) + 1,
    (1 << 31) - 1,
    (1 << 32) - 1,
    (1 << 64) - 1,
]
VALUES: list[Any] = [
    None, True, False, -1, 1.5, "", "x" * 1024, "ram", b"", bytes(15), bytes(16), bytes(64), [], [["ram", 16]], [[]],
    {}, *NUMBERS,
]  # fmt: skip
BLOBS = [
    b"", b"\x80", b"\xc1", b"\x91" * 5000, b"\xdc\x04\x00" * 3000, b"\x81\xa1a" * 3000,
    b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01", b"\xd6\xff\x00\x00\x00\x00",
]  # fmt: skip


def valid_sessions(chance: random.Random, count: int, holding: str) -> list[Session]:
    """What a primary sends in `count` whole sessions to a replica of zeros that is "partial" or "committed"."""
    return [_session(chance, holding) for _ in range(count)]


def _session(chance: random.Random, holding: str) -> Session:
    world = World(GEOMETRY, holding=MemoryHolding(GEOMETRY, holding=holding))
    if chance.random() < 0.2:
        world.to_secondary(world.primary.request_table())
        world.there.events()
        for part in world.secondary.table_frames():
            world.here.deliver(part)
        world.here.events()
    epochs = chance.randrange(1, 4)
    for number in range(epochs):
        for iteration in range(1, chance.choice([1, 1, 2, 3])):
            _pages(world, chance, iteration)
        _pages(world, chance, 0)
        world.to_secondary(world.primary.tick(0))
        final = number == epochs - 1 and chance.random() < 0.3
        for part in world.close_epoch(chance.randbytes(chance.randrange(60)), chance.randbytes(9), final):
            world.to_secondary(part)
        world.settle()
        if final:
            world.to_secondary(world.primary.handover())
        elif chance.random() < 0.2:
            world.to_secondary(world.primary.verify())
            world.there.events()
            world.here.deliver(world.secondary.verified(world.holding.true_digest()))
            world.here.events()
    if world.primary.state.name != "HANDING_OVER":
        world.to_secondary(world.primary.bye("done"))
    return list(frames(b"".join(world.sent)))


def _pages(world: World, chance: random.Random, iteration: int) -> None:
    for region, one in enumerate(GEOMETRY):
        gfns = sorted(chance.sample(range(one.pages), chance.randrange(1, 4)))
        if chance.random() < 0.3:
            gfns = list(range(gfns[0], min(gfns[0] + 4, one.pages)))
        for gfn in gfns:
            world.memory[region][gfn, chance.randrange(4096)] ^= chance.randrange(1, 256)
        if chance.random() < 0.3:
            world.memory[region][gfns[0]] = 0
        world.to_secondary(world.deltas(region, gfns) if not iteration else world.pages(region, gfns, iteration))
    if iteration:
        world.to_secondary(world.primary.end_iteration(iteration))
        world.cache.clear()


# --- mutations of a session's frames; each returns the bytes of the frames it touched in place of them


def _flip(chance: random.Random, data: bytes) -> bytes:
    if not data:
        return chance.randbytes(1)
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 8])):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _flip_meta(chance: random.Random, frame: Frame) -> bytes:
    return frame.pack(meta=_flip(chance, frame.meta))


def _flip_payload(chance: random.Random, frame: Frame) -> bytes:
    return frame.pack(payload=_flip(chance, frame.payload))


def _header_field(chance: random.Random, frame: Frame) -> bytes:
    name = chance.choice(["term", "epoch", "sequence", "version", "flags", "meta_crc", "type"])
    most = {"version": 0xFF, "type": 0xFF, "flags": 0xFFFF, "meta_crc": 0xFFFFFFFF}.get(name, (1 << 64) - 1)
    near = getattr(frame.header, name) + chance.choice([-1, 1])
    value = chance.choice([near, chance.choice(NUMBERS), chance.randrange(1, 18)])
    return frame.pack(**{name: value & most})


def _length_lie(chance: random.Random, frame: Frame) -> bytes:
    name = chance.choice(["meta_length", "payload_length"])
    value = chance.choice([getattr(frame.header, name) + chance.randrange(-20, 21), chance.choice(NUMBERS), 64 << 20])
    return frame.pack(**{name: value & 0xFFFFFFFF})


def _field(chance: random.Random, frame: Frame) -> bytes:
    if frame.header.type is Type.PAGES:
        at, form = chance.choice([(0, "<H"), (2, "<B"), (3, "<B"), *((4 * n, "<I") for n in range(1, 11))])
        value = chance.choice(NUMBERS) & (1 << 8 * struct.calcsize(form)) - 1
        end = at + struct.calcsize(form)
        return frame.pack(meta=frame.meta[:at] + struct.pack(form, value) + frame.meta[end:])
    fields = msgpack.unpackb(frame.meta)
    name = chance.choice([*fields, "extra"])
    if chance.random() < 0.1:
        fields.pop(name, None)
    else:
        fields[name] = chance.choice(VALUES)
    return frame.pack(meta=msgpack.packb(fields))


def _blob(chance: random.Random, frame: Frame) -> bytes:
    return frame.pack(meta=chance.choice(BLOBS))


def _resized_payload(chance: random.Random, frame: Frame) -> bytes:
    size = max(0, len(frame.payload) + chance.choice([-4096, -1, 1, 4096]))
    return frame.pack(payload=frame.payload[:size].ljust(size, b"\x07"))


def _raw_flip(chance: random.Random, frame: Frame) -> bytes:
    return _flip(chance, frame.pack())


def _garbage(chance: random.Random, frame: Frame) -> bytes:
    return frame.pack() + chance.randbytes(chance.randrange(1, 200))


ONE: list[Callable[[random.Random, Frame], bytes]] = [
    _flip_meta, _flip_payload, _header_field, _length_lie, _field, _field, _blob, _resized_payload, _raw_flip, _garbage,
]  # fmt: skip


def _reordered(chance: random.Random, session: Session, others: Sequence[Session]) -> Session:
    session, at = list(session), chance.randrange(len(session))
    match chance.randrange(5):
        case 0:
            session.insert(at, session[at])
        case 1:
            other = chance.randrange(len(session))
            session[at], session[other] = session[other], session[at]
        case 2:
            session.insert(at, chance.choice(chance.choice(others)))
        case 3:
            del session[at]
        case _:
            session[at:] = chance.choice(others)[at:]
    return session


def _renumbered(session: Session) -> Session:
    packed = [frame.pack(sequence=number) for number, frame in enumerate(session)]
    return [frame for data in packed for frame in frames(data)]


def mutated(chance: random.Random, session: Session, others: Sequence[Session]) -> bytes:
    """The bytes of a session to which something happened, or now and then nothing."""
    if chance.random() < 0.4:
        session = _reordered(chance, session, others)
        if chance.random() < 0.7:
            session = _renumbered(session)
    parts = [frame.pack() for frame in session]
    for _ in range(chance.choice([0, 1, 1, 1, 2])):
        if session:
            at = chance.randrange(len(session))
            parts[at] = chance.choice(ONE)(chance, session[at])
    data = b"".join(parts)
    if chance.random() < 0.1:
        data = data[: chance.randrange(len(data) + 1)]
    return data
