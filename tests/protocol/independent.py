"""A second reading of proto/PROTOCOL.md: a decoder and a replica that know the document and nothing of ckptd.

Written for clarity, a page at a time; it trusts its input and checks only what proves that the document is enough.
"""

from __future__ import annotations

import struct
from hashlib import blake2b
from typing import Any

import lz4.block
import msgpack
import xxhash
from crc32c import crc32c

TYPES = (
    "", "HELLO", "WELCOME", "NACK", "TABLE_REQUEST", "TABLE", "PAGES", "ITERATION", "STATE", "OUTPUT", "COMMIT", "ACK",
    "HEARTBEAT", "HANDOVER", "PROMOTED", "VERIFY", "VERIFIED", "BYE",
)  # fmt: skip
PAGE = 4096
M64 = (1 << 64) - 1


def frame_at(data: bytes, at: int = 0) -> tuple[dict[str, Any], Any, bytes, int]:
    """Header, meta, payload, and where the next frame begins."""
    head = data[at : at + 48]
    magic, version, kind, flags, term, epoch, sequence, meta_length, payload_length, meta_crc, crc = struct.unpack(
        "<4sBBHQQQIIII", head
    )
    assert magic == b"CKPD" and flags == 0 and crc == crc32c(head[:44])
    meta = data[at + 48 : at + 48 + meta_length]
    assert crc32c(meta) == meta_crc
    end = at + 48 + meta_length + payload_length
    payload = data[at + 48 + meta_length : end]
    assert len(payload) == payload_length
    header = {"type": TYPES[kind], "version": version, "term": term, "epoch": epoch, "sequence": sequence}
    return header, pages_meta(meta) if TYPES[kind] == "PAGES" else msgpack.unpackb(meta), payload, end


def pages_meta(meta: bytes) -> dict[str, Any]:
    region, flags, zero, count, iteration, raw, delta, padding = struct.unpack_from("<HBBIIIII", meta)
    assert zero == padding == 0 and flags < 4
    named = 1 if flags & 1 else count
    gfns = list(struct.unpack_from(f"<{named}I", meta, 24))
    if flags & 1:
        gfns = [gfns[0] + step for step in range(count)]
    at = 24 + 4 * named
    hashes = [meta[at + 16 * n : at + 16 * n + 16].hex() for n in range(count)]
    kinds = list(meta[at + 16 * count :]) if flags & 2 else None
    return {
        "region": region, "flags": flags, "iteration": iteration, "raw": raw, "delta": delta, "gfns": gfns,
        "hashes": hashes, "kinds": kinds,
    }  # fmt: skip


def page_hash(page: bytes, seed: int) -> bytes:
    return xxhash.xxh3_128(page, seed=seed).intdigest().to_bytes(16, "big")


def splitmix64(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) & M64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
    return z ^ (z >> 31)


def image_digest(images: list[list[bytes]], seed: int) -> bytes:
    s0 = s1 = 0
    for region, pages in enumerate(images):
        for gfn, page in enumerate(pages):
            place = region << 32 | gfn
            a, b = struct.unpack("<QQ", page_hash(page, seed))
            s0 += (splitmix64(place) | 1) * a
            s1 += (splitmix64(~place & M64) | 1) * b
    return struct.pack("<QQ", s0 & M64, s1 & M64)


def next_chain(chain: bytes, epoch: int, term: int, digest: bytes, state_crc: int, output_crc: int) -> bytes:
    numbers = struct.pack("<QQ16sII", epoch, term, digest, state_crc, output_crc)
    return blake2b(chain + numbers, digest_size=16).digest()


def replay(session: bytes) -> list[dict[str, Any]]:
    """What a primary sent in a whole session to an empty replica: for each commit epoch, digest, chain and pages.

    Asserts that every digest and chain is what the commit says.
    """
    at, images, seed, chain, commits = 0, [], 0, bytes(16), []
    staged: dict[tuple[int, int], bytes] = {}
    counted, crcs = 0, [0, 0]
    while at < len(session):
        header, meta, payload, at = frame_at(session, at)
        match header["type"]:
            case "HELLO":
                seed = meta["seed"]
                images = [[bytes(PAGE)] * pages for _, pages in meta["regions"]]
            case "PAGES":
                zero = page_hash(bytes(PAGE), seed).hex()
                kinds = meta["kinds"] or [0 if one == zero else 1 for one in meta["hashes"]]
                raw = iter(range(0, meta["raw"] * PAGE, PAGE))
                block = payload[meta["raw"] * PAGE :]
                size = meta["delta"] * PAGE
                deltas = lz4.block.decompress(block, uncompressed_size=size) if block else b""
                xors = iter(range(0, size, PAGE))
                for gfn, kind, stated in zip(meta["gfns"], kinds, meta["hashes"], strict=True):
                    page = bytes(PAGE)
                    if kind == 1:
                        start = next(raw)
                        page = payload[start : start + PAGE]
                    elif kind == 2:
                        start = next(xors)
                        old = images[meta["region"]][gfn]
                        page = bytes(x ^ y for x, y in zip(old, deltas[start : start + PAGE], strict=True))
                    assert meta["iteration"] or page_hash(page, seed).hex() == stated
                    staged[meta["region"], gfn] = page
                    counted += 1
            case "STATE" | "OUTPUT":
                assert crc32c(payload) == meta["crc"]
                crcs[header["type"] == "OUTPUT"] = meta["crc"]
            case "COMMIT":
                for (region, gfn), page in staged.items():
                    images[region][gfn] = page
                assert meta["pages"] == counted
                assert meta["digest"] == image_digest(images, seed)
                chain = next_chain(chain, header["epoch"], header["term"], meta["digest"], crcs[0], crcs[1])
                assert meta["chain"] == chain
                commits.append({
                    "epoch": header["epoch"], "digest": meta["digest"].hex(), "chain": chain.hex(), "pages": counted
                })  # fmt: skip
                staged, counted = {}, 0
    return commits
