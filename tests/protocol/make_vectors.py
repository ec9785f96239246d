"""Make the golden frames: `python -m tests.protocol.make_vectors` writes proto/vectors/.

They are for ever: a peer of any version must read them. Run this only to add some, and look at the difference.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from ckptd.memory.batch import DELTA
from ckptd.memory.hashing import PageHasher
from ckptd.memory.regions import Geometry
from ckptd.protocol import messages as m
from ckptd.protocol.chain import next_chain
from ckptd.protocol.pages import decode_pages
from ckptd.protocol.wire import Type

from .independent import image_digest, page_hash, splitmix64
from .world import SEED, Frame, World, frames, message_frame

__all__ = ["GEOMETRY", "VECTORS", "make"]

VECTORS = Path(__file__).parents[2] / "proto" / "vectors"
GEOMETRY = Geometry.of(low=4, ram=16)
SOFTWARE = "ckptd 0.1.0"
D, C = bytes(range(16)), bytes(range(16, 32))

CONTROL: dict[str, tuple[m.Message, dict[str, Any], bytes]] = {
    "hello": (
        m.Hello(1, 2, SOFTWARE, "vm", "sim", D, [["low", 4], ["ram", 16]], SEED, "memory", False), {"version": 1}, b"",
    ),
    "welcome": (m.Welcome(2, SOFTWARE, "committed", 41, SEED, D, C), {"epoch": 41}, b""),
    "nack": (m.Nack("stale_term", "term 1 is over", 41, 3), {"epoch": 0}, b""),
    "table_request": (m.TableRequest(), {"epoch": 41}, b""),
    "table": (m.Table(1, 14, True), {"epoch": 41}, D + C),
    "iteration": (m.Iteration(1, 3), {"epoch": 42}, b""),
    "state": (m.State(0), {"epoch": 42}, b"device state"),
    "output": (m.Output(0, 7, 9), {"epoch": 42}, b"held output"),
    "commit": (m.Commit(3, D, C, "durable", False), {"epoch": 42}, b""),
    "ack": (m.Ack("durable", D), {"epoch": 42}, b""),
    "heartbeat": (m.Heartbeat(), {}, b""),
    "handover": (m.Handover(), {"epoch": 42}, b""),
    "promoted": (m.Promoted(D), {"epoch": 42, "term": 2}, b""),
    "verify": (m.Verify(), {"epoch": 42}, b""),
    "verified": (m.Verified(D), {"epoch": 42}, b""),
    "bye": (m.Bye("the operator said so"), {}, b""),
}  # fmt: skip


def make() -> dict[str, bytes]:
    """File names and contents."""
    files: dict[str, bytes] = {}
    for number, (name, (message, fields, payload)) in enumerate(CONTROL.items()):
        if isinstance(message, m.State | m.Output):
            message = dataclasses.replace(message, crc=_crc(payload))
        _add(files, name, message_frame(message, payload, sequence=number, **fields))
    session, named, commits = _session()
    for name, frame in named.items():
        _add(files, name, frame.pack())
    files["session.bin"] = session
    files["session.json"] = _text({"regions": [["low", 4], ["ram", 16]], "seed": SEED, "commits": commits})
    files["numbers.json"] = _text(_numbers())
    return files


def _crc(payload: bytes) -> int:
    from crc32c import crc32c

    return int(crc32c(payload))


def _add(files: dict[str, bytes], name: str, data: bytes) -> None:
    (frame,) = frames(data)
    header = frame.header
    described = {
        "header": {
            "type": header.type.name, "version": header.version, "term": header.term, "epoch": header.epoch,
            "sequence": header.sequence,
        },
        "meta": _pages(frame) if header.type is Type.PAGES else _plain(m.decode(header.type, frame.meta)),
        "meta_hex": frame.meta.hex(),
        "payload_length": len(frame.payload),
    }  # fmt: skip
    if len(frame.payload) <= 64:
        described["payload_hex"] = frame.payload.hex()
    files[f"{name}.bin"] = data
    files[f"{name}.json"] = _text(described)


def _plain(message: m.Message) -> dict[str, Any]:
    """The fields, with bytes as hex."""
    fields = dataclasses.asdict(message)
    return {name: value.hex() if isinstance(value, bytes) else value for name, value in fields.items()}


def _pages(frame: Frame) -> dict[str, Any]:
    pages = decode_pages(frame.header, frame.meta, GEOMETRY, PageHasher(SEED))
    explicit = bool(frame.meta[2] & 2)
    return {
        "region": pages.region, "flags": frame.meta[2], "iteration": pages.iteration, "raw": pages.raw,
        "delta": int(np.count_nonzero(pages.kinds == DELTA)), "gfns": pages.gfns.tolist(),
        "hashes": [row.astype("<u8").tobytes().hex() for row in pages.hashes],
        "kinds": pages.kinds.tolist() if explicit else None,
    }  # fmt: skip


def _session() -> tuple[bytes, dict[str, Frame], list[dict[str, Any]]]:
    """Three epochs: a first image with an iteration and a torn page, deltas and zeros, a final one; then HANDOVER."""
    world, named, commits = World(GEOMETRY), {}, []

    def send(data: bytes, name: str | None = None) -> None:
        world.to_secondary(data)
        if name:
            (named[name],) = frames(data)

    def commit(final: bool = False) -> None:
        for part in world.close_epoch(b"state", b"output", final):
            send(part)
        ready = world.settle()
        commits.append({
            "epoch": ready.epoch, "digest": ready.digest.hex(), "chain": ready.chain.hex(), "pages": ready.pages
        })  # fmt: skip

    world.write(1, range(5), 1)
    send(world.pages(1, range(5), 1, torn=[2]), "pages_run")
    send(b"".join(world.primary.end_iteration(1)))
    world.write(0, [3], 9)
    send(world.pages(0, [3]))
    send(world.pages(1, [0, 2, 3, 4]))
    commit()
    world.memory[1][[2, 3], 1000] ^= 0x80
    world.write(1, [4, 9], 0)
    world.write(1, [11], 6)
    world.memory[1][11] = np.arange(4096, dtype=np.uint16).astype(np.uint8)
    send(world.deltas(1, [2, 3, 4, 9, 11]), "pages_delta")
    commit()
    world.write(0, [3], 0)
    world.write(0, [1], 2)
    send(world.pages(0, [1, 3]), "pages_zero")
    commit(final=True)
    send(b"".join(world.primary.handover()))
    session = b"".join(world.sent)
    (hello,) = frames(world.sent[0])
    message = dataclasses.replace(m.decode(Type.HELLO, hello.meta), software=SOFTWARE)
    return hello.pack(meta=m.encode(message)) + session[len(world.sent[0]) :], named, commits


def _numbers() -> dict[str, Any]:
    """The worked examples of PROTOCOL.md."""
    zero, page = bytes(4096), bytes(range(256)) * 16
    places = [(0, 0), (0, 1), (1, 0), (1, 15)]
    memory = World(GEOMETRY, greet=False)
    empty = memory.table.digest
    memory.memory[1][2] = np.frombuffer(page, np.uint8)
    memory.table.rehash(memory.memory)
    digest, mask = memory.table.digest, (1 << 64) - 1
    return {
        "seed": SEED,
        "hash_of_zeros": page_hash(zero, SEED).hex(),
        "hash_of_bytes_0_to_255_repeated": page_hash(page, SEED).hex(),
        "multipliers": [
            {
                "region": region, "gfn": gfn,
                "m0": f"{splitmix64(region << 32 | gfn) | 1:#018x}",
                "m1": f"{splitmix64(~(region << 32 | gfn) & mask) | 1:#018x}",
            }
            for region, gfn in places
        ],
        "digest_of_one_region_of_two_pages_zeros_and_that_page": image_digest([[zero, page]], SEED).hex(),
        "digest_of_zeros": empty.hex(),
        "digest_with_that_page_at_region_1_gfn_2": digest.hex(),
        "chain": {
            "epoch": 1, "term": 1, "digest": digest.hex(), "state_crc": _crc(b"state"), "output_crc": _crc(b"output"),
            "chain": next_chain(bytes(16), 1, 1, digest, _crc(b"state"), _crc(b"output")).hex(),
        },
        "crc32c_of_123456789": _crc(b"123456789"),
    }  # fmt: skip


def _text(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


if __name__ == "__main__":
    VECTORS.mkdir(parents=True, exist_ok=True)
    for name, content in make().items():
        (VECTORS / name).write_bytes(content)
        print(f"{len(content):7} {name}")
