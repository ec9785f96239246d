"""The golden frames of proto/vectors: what was once on the wire is read and written the same for ever.

They are read twice: by ckptd, and by a decoder that knows only PROTOCOL.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crc32c import crc32c

from ckptd.memory.digest import HashTable
from ckptd.memory.hashing import PageHasher
from ckptd.memory.regions import Geometry
from ckptd.protocol import messages as m
from ckptd.protocol.chain import next_chain
from ckptd.protocol.pages import decode_pages, encode_pages
from ckptd.protocol.secondary import EpochReady, HandoverReady, HelloReceived, SecondaryMachine
from ckptd.protocol.wire import Type, pack_frame

from . import independent
from .make_vectors import GEOMETRY, VECTORS, make
from .world import SEED, TIMING, MemoryHolding, Side, frames

FRAMES = sorted(path for path in VECTORS.glob("*.bin") if path.name != "session.bin")
NUMBERS = json.loads((VECTORS / "numbers.json").read_text())
SESSION = json.loads((VECTORS / "session.json").read_text())


def described(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".json").read_text())


def test_every_type_has_a_vector_and_every_vector_a_maker() -> None:
    assert {described(path)["header"]["type"] for path in FRAMES} == {kind.name for kind in Type}
    assert set(make()) == {path.name for path in VECTORS.iterdir()}


@pytest.mark.parametrize("path", FRAMES, ids=lambda path: path.stem)
def test_a_vector_is_read_and_written_the_same(path: Path) -> None:
    data = path.read_bytes()
    (frame,) = frames(data)
    header = frame.header
    if header.type is Type.PAGES:
        hasher = PageHasher(SEED)
        pages = decode_pages(header, frame.meta, GEOMETRY, hasher)
        meta = encode_pages(pages.region, pages.gfns, pages.hashes, pages.iteration, pages.kinds, hasher.zero)
    else:
        meta = m.encode(m.decode(header.type, frame.meta))
    head = pack_frame(
        header.type, meta, len(frame.payload), term=header.term, epoch=header.epoch, sequence=header.sequence,
        version=header.version,
    )  # fmt: skip
    assert head + frame.payload == data


@pytest.mark.parametrize("path", FRAMES, ids=lambda path: path.stem)
def test_the_document_is_enough_to_read_a_vector(path: Path) -> None:
    data, told = path.read_bytes(), described(path)
    header, meta, payload, end = independent.frame_at(data)
    assert end == len(data) and header == told["header"]
    assert {k: v.hex() if isinstance(v, bytes) else v for k, v in meta.items()} == told["meta"]
    assert data[48 : 48 + len(told["meta_hex"]) // 2].hex() == told["meta_hex"]
    assert len(payload) == told["payload_length"] and payload.hex() == told.get("payload_hex", payload.hex())
    if header["type"] in ("STATE", "OUTPUT"):
        assert meta["crc"] == crc32c(payload)


def test_the_golden_session_replays_to_its_digests() -> None:
    holding = MemoryHolding(GEOMETRY)
    machine = SecondaryMachine(TIMING, 0)
    side, commits, last = Side(machine), [], None
    side.deliver((VECTORS / "session.bin").read_bytes())
    while events := side.events():
        (last,) = events
        if isinstance(last, HelloReceived):
            machine.welcome(holding)
        elif isinstance(last, EpochReady):
            holding.commit(last)
            machine.acknowledge("memory")
            assert holding.true_digest() == last.digest
            commits.append({
                "epoch": last.epoch, "digest": last.digest.hex(), "chain": last.chain.hex(), "pages": last.pages
            })  # fmt: skip
    assert commits == SESSION["commits"] and last == HandoverReady(3)


def test_the_document_is_enough_to_replay_the_session() -> None:
    assert independent.replay((VECTORS / "session.bin").read_bytes()) == SESSION["commits"]


def test_the_numbers_of_the_document() -> None:
    hasher, page = PageHasher(NUMBERS["seed"]), np.tile(np.arange(256, dtype=np.uint8), (1, 16))
    assert hasher.zero.astype("<u8").tobytes().hex() == NUMBERS["hash_of_zeros"]
    assert hasher.hash_rows(page).tobytes().hex() == NUMBERS["hash_of_bytes_0_to_255_repeated"]
    table = HashTable(GEOMETRY, hasher)
    assert table.digest.hex() == NUMBERS["digest_of_zeros"]
    table.update(1, np.array([2]), hasher.hash_rows(page))
    assert table.digest.hex() == NUMBERS["digest_with_that_page_at_region_1_gfn_2"]
    images = [[bytes(4096)] * 4, [bytes(4096)] * 16]
    images[1][2] = bytes(range(256)) * 16
    assert independent.image_digest(images, NUMBERS["seed"]) == table.digest
    two = HashTable(Geometry.of(ram=2), hasher)
    two.update(0, np.array([1]), hasher.hash_rows(page))
    assert two.digest.hex() == NUMBERS["digest_of_one_region_of_two_pages_zeros_and_that_page"]
    chain = NUMBERS["chain"]
    made = next_chain(
        bytes(16),
        chain["epoch"],
        chain["term"],
        bytes.fromhex(chain["digest"]),
        chain["state_crc"],
        chain["output_crc"],
    )
    assert made.hex() == chain["chain"] and NUMBERS["crc32c_of_123456789"] == crc32c(b"123456789") == 0xE3069283
    document = (VECTORS.parent / "PROTOCOL.md").read_text()
    for number in (
        NUMBERS["hash_of_zeros"], NUMBERS["hash_of_bytes_0_to_255_repeated"], NUMBERS["digest_of_zeros"],
        table.digest.hex(), two.digest.hex(), chain["chain"], *(one["m0"] for one in NUMBERS["multipliers"]),
        *(one["m1"] for one in NUMBERS["multipliers"]),
    ):  # fmt: skip
        assert number in document, number


def test_the_document_names_every_type_field_and_code() -> None:
    document = (VECTORS.parent / "PROTOCOL.md").read_text()
    words = [kind.name for kind in Type] + list(m.NACK_CODES)
    words += [name for path in FRAMES for name in described(path)["meta"]]
    assert [word for word in words if f"`{word}`" not in document] == []
