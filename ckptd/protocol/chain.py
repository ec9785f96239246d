"""The digest chain: each epoch's link depends on every epoch before it, so a missing, repeated or exchanged epoch shows at once."""

from __future__ import annotations

import struct
from hashlib import blake2b

__all__ = ["CHAIN_SIZE", "CHAIN_START", "next_chain"]

CHAIN_SIZE = 16
CHAIN_START = bytes(CHAIN_SIZE)
"""The chain before epoch 1."""


def next_chain(previous: bytes, epoch: int, term: int, digest: bytes, state_crc: int, output_crc: int) -> bytes:
    """blake2b-16 over previous, epoch u64, term u64, digest, crc32c of state u32, crc32c of output u32; little-endian."""
    numbers = struct.pack("<QQ16sII", epoch, term, digest, state_crc, output_crc)
    return blake2b(previous + numbers, digest_size=CHAIN_SIZE).digest()
